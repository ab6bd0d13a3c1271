"""One file -> its documents: text, JSON lines, tables, parquet.

A text file is one document; one of over 100 kB is cut at blank lines (else line ends) into documents of about 20 kB,
so that it can be shuffled and held out. The others hold one document per record, in the field `text`. No reader loses a
row or a part of a field without an error, and none holds more than a document in memory.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mlx_slm.errors import SlmError
from mlx_slm.files import parse_json
from mlx_slm.text.kinds import FOREIGN, known_kind, looks_like, not_utf8, opened

LONG_TEXT, TEXT_PART = 100_000, 20_000
MAX_DOCUMENT = 16 << 20
FEWEST_ROWS, MOST_ROWS = 8, 256
"""Documents of a parquet file that are in memory at once: few, where one may be as large as all of a group."""
BOMB_BYTES, BOMB_RATIO = 64 << 20, 1000
"""A column of parquet that is larger than this, and this many times what it takes on the disk, is no text."""


@dataclass
class Reading:
    """How to read, and what was met on the way."""

    text_field: str = "text"
    strict: bool = False
    """Fail on invalid UTF-8 instead of replacing it."""
    max_document_bytes: int = MAX_DOCUMENT
    replaced: int = 0
    """Documents in which invalid UTF-8 was replaced."""
    empty_files: list[str] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)
    """Files of directories that were not read, by why."""
    revisions: dict[str, str] = field(default_factory=dict)
    """The commit of each source on the Hub."""
    streams: Path | None = None
    """Where what comes from the Hub is kept until the set is prepared."""
    bytes_read: int = 0
    """Bytes of the files that are done, as they lie on the disk."""
    current: BinaryIO | None = None
    """The file that is being read."""

    @property
    def position(self) -> int:
        """Bytes read so far, as they lie on the disk."""
        return self.bytes_read + (self.current.tell() if self.current and not self.current.closed else 0)

    def too_long(self, where: str) -> SlmError:
        """The error for a document that is longer than is read."""
        return SlmError(
            f"{where}: a document of more than {self.max_document_bytes:,} bytes: cut it into several, or raise "
            "data.max_document_bytes (it takes some fifty times its size in memory)"
        )


def read_file(path: Path, reading: Reading) -> Iterator[str]:
    """Yield the documents of one file that have any text in them."""
    import zstandard

    reader = {"text": _read_text, "json": _read_json, "table": _read_table, "parquet": _read_parquet}
    try:
        for document in reader[known_kind(path).reader](path, reading):
            if document and not document.isspace():
                yield document
        reading.bytes_read += path.stat().st_size
        reading.current = None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SlmError(f"{path}: truncated or damaged gzip or zstd ({error}); fetch the file again") from error
    except zstandard.ZstdError as error:
        raise SlmError(
            f"{path}: truncated or damaged zstd, or made with --long ({error}); fetch the file again, or compress it "
            "without --long"
        ) from error
    except FileNotFoundError as error:
        raise SlmError(f"{path}: gone while it was read; bring it back and run the same command again") from error
    except UnicodeDecodeError as error:
        raise SlmError(
            f"{path}: its {error.encoding} is damaged ({error.reason}); mend it or fetch it again"
        ) from error
    except OSError as error:
        raise SlmError(f"{path}: cannot be read ({error.strerror or error})") from error


def decode(raw: bytes, where: str, reading: Reading) -> str:
    """UTF-8 -> text; what is none is replaced and counted. Raises SlmError with `strict`, for another encoding, and for
    a document that is too long."""
    if len(raw) > reading.max_document_bytes:
        raise reading.too_long(where)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if reading.strict:
            raise SlmError(f"{where}: invalid UTF-8 at byte {error.start} (without --strict it is replaced)") from error
        text = raw.decode("utf-8", errors="replace")
        reading.replaced += 1
    foreign = looks_like(raw) if text.count("\ufffd") + text.count("\0") > max(8, FOREIGN * len(text)) else None
    if foreign:
        raise not_utf8(where, foreign)
    return text


def text_field(record, where: str, reading: Reading) -> str:
    """The text of a record, in which bytes that are no UTF-8 may stand escaped; raises SlmError where it has none."""
    if not isinstance(record, dict):
        raise SlmError(
            f"{where}: expected an object with a field {reading.text_field!r}, found a {type(record).__name__}"
            + (": make lines of it with jq -c '.[]'" if isinstance(record, list) else "")
        )
    if reading.text_field not in record:
        fields = ", ".join(str(name)[:60] for name in itertools.islice(record, 20))
        raise SlmError(f"{where}: no field {reading.text_field!r}; its fields: {fields}; name one with --field")
    value = record[reading.text_field]
    if value is None:
        return ""
    if isinstance(value, bytes):
        return decode(value, where, reading)
    if not isinstance(value, str):
        raise SlmError(f"{where}: field {reading.text_field!r} is a {type(value).__name__}, not text")
    try:
        raw = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate from a JSON escape, which is no UTF-8 either
        raw = value.encode("utf-8", "surrogatepass")
    return decode(raw, where, reading)


def _lines(file: BinaryIO, path: Path, reading: Reading) -> Iterator[bytes]:
    """Lines of at most six times a document, for JSON may write a character as six."""
    for number in itertools.count(1):
        line = file.readline(6 * reading.max_document_bytes + 1)
        if not line:
            return
        if len(line) > 6 * reading.max_document_bytes:
            raise reading.too_long(f"{path}:{number}")
        yield line


def _read_text(path: Path, reading: Reading) -> Iterator[str]:
    """The parts joined are the file, to the byte."""
    with opened(path) as (reading.current, file):
        head = file.read(LONG_TEXT + 1)
        if len(head) <= LONG_TEXT:
            yield decode(head, str(path), reading)
            return
        cut_line = head.rfind(b"\n") + 1
        lines = head[:cut_line].splitlines(keepends=True) if cut_line else []
        for part in _parts(_chain_lines(lines, head[cut_line:], file, path, reading)):
            yield decode(part, str(path), reading)


def cut(text: str) -> Iterator[str]:
    """A text in the documents that a text file of it would be."""
    raw = text.encode()
    if len(raw) <= LONG_TEXT:
        yield text
    else:
        yield from (part.decode() for part in _parts(raw.splitlines(keepends=True)))


def _parts(lines: Iterable[bytes]) -> Iterator[bytes]:
    part: list[bytes] = []
    size = 0
    for line in lines:
        if size >= TEXT_PART and (not part[-1].strip() or size >= 2 * TEXT_PART):
            yield b"".join(part)
            part, size = [], 0
        part.append(line)
        size += len(line)
    if part:
        yield b"".join(part)


def _chain_lines(lines: list[bytes], carried: bytes, file, path: Path, reading: Reading) -> Iterator[bytes]:
    yield from lines
    first = carried + file.readline(reading.max_document_bytes + 1)
    if len(first) > reading.max_document_bytes:
        raise reading.too_long(str(path))
    if first:
        yield first
    yield from _lines(file, path, reading)


def _read_json(path: Path, reading: Reading) -> Iterator[str]:
    with opened(path) as (reading.current, file):
        for number, raw in enumerate(_lines(file, path, reading), 1):
            where = f"{path}:{number}"
            if not raw.strip():
                continue
            try:
                record = parse_json(raw.decode("utf-8", "surrogateescape"))
            except ValueError as error:
                reason, lines = str(error)[:200], "make one line of each object with jq -c"
                whole = {b"[": f"{lines} '.[]'", b"{": f"{lines} ."}.get(raw.strip())
                advice = whole or (f"{lines} ." if "Extra data" in reason else "mend or remove the line")
                raise SlmError(f"{where}: not a JSON object on one line ({reason}); {advice}") from error
            yield text_field(record, where, reading)


def _read_table(path: Path, reading: Reading) -> Iterator[str]:
    limit = reading.max_document_bytes
    csv.field_size_limit(limit)
    with opened(path) as (reading.current, file):
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        lines = iter(lambda: text.readline(limit + 1), "")
        blank, first = next(((i, line) for i, line in enumerate(lines) if line.strip()), (0, ""))
        lines = itertools.chain([first], lines)
        rows = csv.reader(_bounded(lines, path, reading), delimiter=_delimiter(first, path, reading), strict=True)
        started = blank + 1
        try:
            header = next(filter(None, rows), [])
            place = _place(header, path, reading)
            for row in rows:
                where, started = f"{path}:{started + 1}", blank + rows.line_num
                if row and len(row) != len(header):
                    raise SlmError(
                        f"{where}: {len(row)} fields, the header has {len(header)}: put quotes around a text that has "
                        f"the delimiter {rows.dialect.delimiter!r} in it"
                    )
                if row:
                    yield decode(row[place].encode("utf-8", "surrogateescape"), where, reading)
        except csv.Error as error:
            if "field larger" in str(error):
                raise reading.too_long(f"{path}:{started + 1}") from error
            raise SlmError(
                f"{path}:{started + 1}: not valid CSV ({error}): a quote that is not closed, or one inside a text that "
                "is not doubled?"
            ) from error


def _bounded(lines: Iterator[str], path: Path, reading: Reading) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if len(line) > reading.max_document_bytes:
            raise reading.too_long(f"{path}:{number}")
        yield line


def _delimiter(header: str, path: Path, reading: Reading) -> str:
    """The delimiter that the name says, or the one of , ; tab | with which the header has the field."""
    named = known_kind(path).delimiter or ","
    for delimiter in (named, ",", ";", "\t", "|"):
        if reading.text_field in next(csv.reader([header.rstrip("\r\n")], delimiter=delimiter), []):
            return delimiter
    return named


def _place(header: list[str], path: Path, reading: Reading) -> int:
    where, name = f"{path}:1", reading.text_field
    if header.count(name) > 1:
        raise SlmError(f"{where}: {header.count(name)} columns are named {name!r}: rename all but one")
    if not header:
        return 0
    text_field(dict.fromkeys(header, ""), where, reading)
    return header.index(name)


def _read_parquet(path: Path, reading: Reading) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        if file.schema_arrow.names.count(reading.text_field) > 1:
            raise SlmError(f"{path}: several columns are named {reading.text_field!r}: rename all but one")
        if reading.text_field not in file.schema_arrow.names:
            text_field(dict.fromkeys(file.schema_arrow.names), str(path), reading)
        largest = _largest_text(file.metadata, path, reading.text_field)
        rows_at_once = min(MOST_ROWS, max(FEWEST_ROWS, BOMB_BYTES // max(1, largest)))
        row = 0
        for batch in file.iter_batches(batch_size=rows_at_once, columns=[reading.text_field]):
            for value in _as_bytes(batch.column(reading.text_field)).to_pylist():
                row += 1
                yield text_field({reading.text_field: value}, f"{path}, row {row}", reading)
        if row != file.metadata.num_rows:
            raise OSError(f"{row} of {file.metadata.num_rows} rows could be read")
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SlmError(f"{path}: damaged or not a parquet file ({reason}); fetch the file again") from error


def _largest_text(metadata, path: Path, text_field: str) -> int:
    """Bytes of the largest group of rows; raises SlmError where one is a bomb, for pages are decompressed before they
    can be looked at."""
    largest = 0
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            if not f"{column.path_in_schema}.".startswith(f"{text_field}."):
                continue
            size, packed = column.total_uncompressed_size, column.total_compressed_size
            largest = max(largest, size)
            if size > BOMB_BYTES and size > BOMB_RATIO * packed:
                raise SlmError(
                    f"{path}: {packed:,} bytes of its column {column.path_in_schema!r} stand for {size:,}: no text is "
                    "like that; leave the file out"
                )
    return largest


def _as_bytes(column):
    """A column of text as bytes: pyarrow would raise for what is no UTF-8."""
    import pyarrow

    kinds = pyarrow.types
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    if kinds.is_string(column.type) or kinds.is_large_string(column.type) or kinds.is_string_view(column.type):
        return column.cast(pyarrow.large_binary())
    return column

"""Sources -> documents. A source is a file, a glob, a directory, `hf:<dataset>[:<config>]` or `docs:<packages>`.

A text file is one document; one of over 100 kB is cut at blank lines (else line ends) into documents of about 20 kB,
so that it can be shuffled and held out. jsonl, csv and parquet hold one document per record, in the field `text`.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mlx_slm.errors import SlmError
from mlx_slm.text import docstrings
from mlx_slm.workspace import file_fingerprint, fingerprint

TEXT = {".txt", ".md", ".rst", ".text"}
JSON = {".jsonl", ".ndjson", ".json"}
CSV = {".csv", ".tsv"}
LONG_TEXT, TEXT_PART = 100_000, 20_000
SPLITS = ("train", "valid", "test")


@dataclass
class Reading:
    """How to read, and what was met on the way."""

    text_field: str = "text"
    strict: bool = False
    """Fail on invalid UTF-8 instead of replacing it."""
    replaced: int = 0
    """Documents in which invalid UTF-8 was replaced."""
    empty_files: list[str] = field(default_factory=list)
    bytes_read: int = 0
    """Bytes of the files that are done, as they lie on the disk."""
    current: BinaryIO | None = None
    """The file that is being read."""

    @property
    def position(self) -> int:
        """Bytes read so far, as they lie on the disk."""
        return self.bytes_read + (self.current.tell() if self.current and not self.current.closed else 0)


@dataclass(frozen=True)
class Source:
    """One source as the user wrote it, with the split that it was given for (None: split by hash)."""

    text: str
    split: str | None

    @classmethod
    def parse(cls, text: str) -> Source:
        """'train=a.jsonl' -> Source('a.jsonl', 'train')."""
        head, equals, rest = text.partition("=")
        return cls(rest, head) if equals and head in SPLITS else cls(text, None)

    @property
    def remote(self) -> bool:
        return self.text.startswith(("hf:", "docs:"))

    def files(self) -> list[Path]:
        """The files of a local source in a fixed order; raises SlmError if there are none or a kind is unknown."""
        path = Path(self.text).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and file_kind(p) and not p.name.startswith("."))
            if not found:
                raise SlmError(f"{self.text}: no text files in this directory ({_known_kinds()})")
            return found
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if path.is_file():
            found = [path]
        if not found:
            raise SlmError(
                f"{self.text}: no such file; check the path" + (" or the pattern" if "*" in self.text else "")
            )
        for file in found:
            if not file_kind(file):
                raise SlmError(f"{file}: unknown kind of file; known: {_known_kinds()}")
        return found

    def fingerprint(self) -> str:
        """Changes when the text behind the source may have changed."""
        if self.text.startswith("docs:"):
            return fingerprint([self.text, docstrings.versions(self.text[5:])])
        if self.remote:
            return fingerprint(self.text)
        return fingerprint([(p.name, file_fingerprint(p)) for p in self.files()])

    def documents(self, reading: Reading) -> Iterator[str]:
        """Yield the documents, in the source's order."""
        if self.text.startswith("docs:"):
            yield from docstrings.documents(self.text[5:])
        elif self.remote:
            yield from _read_hub(self.text, reading)
        else:
            for path in self.files():
                count = 0
                for document in read_file(path, reading):
                    count += 1
                    yield document
                if not count:
                    reading.empty_files.append(str(path))


def file_kind(path: Path) -> str | None:
    """'text', 'json', 'csv' or 'parquet', whether compressed or not; None for others."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    kinds = {"text": TEXT, "json": JSON, "csv": CSV, "parquet": {".parquet"}}
    return next((kind for kind, known in kinds.items() if last in known), None)


def read_file(path: Path, reading: Reading) -> Iterator[str]:
    """Yield the documents of one file that have any text in them."""
    kind = file_kind(path)
    reader = {"text": _read_text, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet}[kind]
    try:
        for document in reader(path, reading):
            if document and not document.isspace():
                yield document
        reading.bytes_read += path.stat().st_size
        reading.current = None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SlmError(f"{path}: truncated or damaged gzip ({error}); fetch the file again") from error
    except _zstd_error() as error:
        raise SlmError(f"{path}: truncated or damaged zstd ({error}); fetch the file again") from error
    except PermissionError as error:
        raise SlmError(f"{path}: cannot be read ({error.strerror})") from error


@contextlib.contextmanager
def _open(path: Path, reading: Reading) -> Iterator[BinaryIO]:
    """Open for bytes, decompressing; a stream that ends early raises EOFError."""
    with open(path, "rb") as raw:
        reading.current = raw
        if path.suffix == ".gz":
            yield gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            yield io.BufferedReader(_ZstdStream(raw), 1 << 20)
        else:
            yield raw


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a .zst file of any number of frames."""

    def __init__(self, file: BinaryIO):
        import zstandard

        self._new = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._file, self._frame, self._fed, self._ready = file, self._new(), False, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            if self._frame.eof:
                data, self._frame, self._fed = self._frame.unused_data, self._new(), False
            else:
                data = b""
            data = data or self._file.read(1 << 18)
            if not data:
                if self._fed:
                    raise EOFError("the stream ends inside a frame")
                return 0
            self._fed = True
            self._ready = self._frame.decompress(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _decode(raw: bytes, where: str, reading: Reading) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if reading.strict:
            raise SlmError(f"{where}: invalid UTF-8 at byte {error.start} (without --strict it is replaced)") from error
        reading.replaced += 1
        return raw.decode("utf-8", errors="replace")


def _read_text(path: Path, reading: Reading) -> Iterator[str]:
    """The parts joined are the file, to the byte."""
    with _open(path, reading) as file:
        head = file.read(LONG_TEXT + 1)
        is_short = len(head) <= LONG_TEXT
        head = head.removeprefix(codecs.BOM_UTF8)
        if is_short:
            yield _decode(head, str(path), reading)
            return
        part: list[bytes] = []
        size = 0
        cut_line = head.rfind(b"\n") + 1
        lines = head[:cut_line].splitlines(keepends=True) if cut_line else []
        carried = head[cut_line:]
        for line in _chain_lines(lines, carried, file):
            if size >= TEXT_PART and (not part[-1].strip() or size >= 2 * TEXT_PART):
                yield _decode(b"".join(part), str(path), reading)
                part, size = [], 0
            part.append(line)
            size += len(line)
        if part:
            yield _decode(b"".join(part), str(path), reading)


def _chain_lines(lines: list[bytes], carried: bytes, file) -> Iterator[bytes]:
    yield from lines
    first = carried + file.readline()
    if first:
        yield first
    yield from file


def _read_json(path: Path, reading: Reading) -> Iterator[str]:
    with _open(path, reading) as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            line = _decode(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, where, reading)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise SlmError(f"{where}: not a JSON object on one line ({error}); mend or remove the line") from error
            yield _text_field(record, where, reading)


def _text_field(record, where: str, reading: Reading) -> str:
    if not isinstance(record, dict):
        raise SlmError(
            f"{where}: expected an object with a field {reading.text_field!r}, found a {type(record).__name__}"
        )
    if reading.text_field not in record:
        raise SlmError(
            f"{where}: no field {reading.text_field!r}; its fields: {', '.join(map(str, record))}; "
            "name one with --field"
        )
    value = record[reading.text_field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SlmError(f"{where}: field {reading.text_field!r} is a {type(value).__name__}, not text")
    # A lone surrogate from a JSON escape is no UTF-8 either.
    return _decode(value.encode("utf-8", "surrogatepass"), where, reading)


def _read_csv(path: Path, reading: Reading) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    with _open(path, reading) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        try:
            rows = csv.DictReader(text, delimiter=delimiter, strict=True)
            for row in rows:
                row.pop(None, None)
                raw = {k: v.encode("utf-8", "surrogateescape") if v else b"" for k, v in row.items()}
                where = f"{path}:{rows.line_num}"
                if reading.text_field in raw:
                    yield _decode(raw[reading.text_field], where, reading)
                else:
                    _text_field(row, where, reading)
        except csv.Error as error:
            raise SlmError(f"{path}:{rows.line_num}: not valid CSV ({error})") from error


def _read_parquet(path: Path, reading: Reading) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if reading.text_field not in file.schema_arrow.names:
            raise SlmError(
                f"{path}: no column {reading.text_field!r}; its columns: {', '.join(file.schema_arrow.names)}; "
                "name one with --field"
            )
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[reading.text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield _text_field({reading.text_field: value}, f"{path}, row {row}", reading)
    except (pyarrow.ArrowException, OSError) as error:
        raise SlmError(f"{path}: damaged or not a parquet file ({error}); fetch the file again") from error


def _read_hub(source: str, reading: Reading) -> Iterator[str]:
    """`hf:<dataset>[:<config>][?<field>=<value>]`: the train split, streamed; a local dataset directory works too.

    With `?` only records whose field (such as meta.pile_set_name) has that value are taken.
    """
    import datasets

    address, _, condition = source.partition("?")
    _, name, *rest = address.split(":")
    if not name or (condition and "=" not in condition):
        raise SlmError(f"{source}: write it as hf:<dataset>, hf:<dataset>:<config> or hf:<dataset>?<field>=<value>")
    try:
        stream = datasets.load_dataset(name, *rest, split="train", streaming=True)
        for index, record in enumerate(stream):
            if condition and not _matches(record, condition, source):
                continue
            text = _text_field(record, f"{source}, record {index}", reading)
            if text and not text.isspace():
                yield text
    except SlmError:
        raise
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ConnectionError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SlmError(f"{source}: cannot be read ({reason}); check the name and the network") from error


def _matches(record: dict, condition: str, source: str) -> bool:
    path, _, value = condition.partition("=")
    found = record
    for key in path.split("."):
        if not isinstance(found, dict) or key not in found:
            raise SlmError(f"{source}: its records have no field {path!r}; their fields: {', '.join(record)}")
        found = found[key]
    return str(found) == value


def _known_kinds() -> str:
    return " ".join(sorted(TEXT | JSON | CSV | {".parquet"})) + ", each but parquet also .gz and .zst"


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError

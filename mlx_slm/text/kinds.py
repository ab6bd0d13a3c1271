"""What a file of text is, by its name and its first bytes: kind, compression, encoding. Nothing else decides these."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mlx_slm.errors import SlmError
from mlx_slm.files import open_regular

SUFFIXES = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".text": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "parquet",
}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
COMPRESSED = (".gz", ".zst")
MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
HEAD = 1 << 16
"""Bytes that an encoding is told by."""
FEED = 256
"""Compressed bytes that zstd gets at once: a block of 128 kB may come from four of them."""
WINDOW = 1 << 27
"""The largest window of zstd, as of its own program without --long."""
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
WESTERN = 0.5
"""Up to this many accented letters for each plain one a text is of western Europe."""
FOREIGN = 0.1
"""A text in which more than this part of the characters is no UTF-8 is of another encoding."""


@dataclass(frozen=True)
class Kind:
    """`reader`: text, json, table or parquet; `delimiter`: of a table."""

    reader: str
    compression: str | None
    delimiter: str | None


def kind_of(path: Path) -> Kind | None:
    """The kind of a file by the end of its name, in any case; None for one that is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else None
    last = suffixes[-1] if suffixes else ""
    if last not in SUFFIXES or (compression and last == ".parquet"):
        return None
    return Kind(SUFFIXES[last], compression, DELIMITERS.get(last))


def known_kind(path: Path) -> Kind:
    """The kind of a file that is read; raises SlmError for another one."""
    kind = kind_of(path)
    if kind is None:
        raise SlmError(f"{path}: not a kind of file that is read ({known_kinds()})")
    return kind


def known_kinds() -> str:
    return " ".join(sorted(SUFFIXES)) + ", each but parquet also .gz and .zst"


def is_hidden(path: Path, directory: Path) -> bool:
    """Whether a file, or a folder between it and the directory, is hidden."""
    return any(part.startswith(".") for part in path.relative_to(directory).parts)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the file as it lies on the disk, its text as UTF-8): decompressed, and turned into UTF-8 where a mark at the
    start says UTF-16 or UTF-32.

    A stream that ends early raises EOFError. Raises SlmError, with what it looks like, for another encoding.
    """
    with io.BufferedReader(open_regular(path), 1 << 18) as raw:
        compression = known_kind(path).compression
        _require_compression(path, compression, raw.peek(4)[:4])
        stream: io.BufferedIOBase = raw
        if compression == ".gz":
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), HEAD)
        elif compression == ".zst":
            stream = io.BufferedReader(_Zstd(raw), HEAD)
        head = _head(stream)
        encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
        body = io.BufferedReader(_Joined(head, stream), HEAD)
        if encoding:
            yield raw, io.BufferedReader(_AsUtf8(body, encoding), HEAD)
        else:
            if foreign := looks_like(head):
                raise not_utf8(str(path), foreign)
            if head.startswith(codecs.BOM_UTF8):
                body.read(len(codecs.BOM_UTF8))
            yield raw, body


def _require_compression(path: Path, named: str | None, head: bytes) -> None:
    """Raise SlmError where the first bytes of a file say another compression than its name."""
    actual = next((suffix for suffix, magic in MAGIC.items() if head.startswith(magic)), None)
    if actual and actual != named:
        raise SlmError(f"{path} is compressed, as a file that ends in {actual}: name it so")
    if head and named and not actual and not (named == ".zst" and head[1:] == b"\x2a\x4d\x18"):
        raise SlmError(
            f"{path} ends in {named} but is not compressed that way: name it as what it is, or fetch it again"
        )


NO_TEXT = "no text"


def not_utf8(where: str, foreign: str) -> SlmError:
    """The error for bytes that look like another encoding (or `NO_TEXT`)."""
    if foreign == NO_TEXT:
        return SlmError(f"{where}: not UTF-8, and no text in any encoding that is known: leave it out")
    return SlmError(
        f"{where}: not UTF-8, it looks like {foreign}: turn it into UTF-8 first (iconv -f {foreign} -t UTF-8), look "
        "whether its letters are right, and give that"
    )


def looks_like(head: bytes) -> str | None:
    """The encoding that the start of a text seems to have, where it is none that UTF-8 could be with some damage."""
    if len(head) >= 8 and head.count(0) > len(head) / 5:
        zeros = [head[place::4].count(0) for place in range(4)]
        wide = min(zeros[1], zeros[2]) > len(head) / 5
        if wide:
            return "UTF-32LE" if zeros[3] > zeros[0] else "UTF-32BE"
        return "UTF-16LE" if zeros[1] + zeros[3] > zeros[0] + zeros[2] else "UTF-16BE"
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
    if text.count("\ufffd") - head.count("\ufffd".encode()) <= max(8, FOREIGN * len(text)):
        return None
    letters, high = sum(map(_is_letter, head)), sum(byte >= 0xC0 for byte in head)
    if 0 < high < WESTERN * letters and head.count(0) == 0:
        return "windows-1252"
    from charset_normalizer import from_bytes

    guess = from_bytes(head).best()
    return guess.encoding.replace("_", "-") if guess and guess.encoding != "utf_8" else NO_TEXT


def _is_letter(byte: int) -> bool:
    return 0x41 <= byte & ~0x20 <= 0x5A


def _head(stream: io.BufferedIOBase) -> bytes:
    parts, size = [], 0
    while size < HEAD and (part := stream.read(HEAD - size)):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


class _Stream(io.RawIOBase):
    """Bytes that `_more` gives a piece at a time; b"" at the end."""

    _ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if not self._ready:
            self._ready = self._more()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _more(self) -> bytes:
        raise NotImplementedError


class _Joined(_Stream):
    """A head that was read before, and the rest."""

    def __init__(self, head: bytes, rest: io.BufferedIOBase):
        self._ready, self._rest = head, rest

    def _more(self) -> bytes:
        return self._rest.read1(HEAD)


class _AsUtf8(_Stream):
    """A stream of another encoding, without its mark; raises UnicodeDecodeError for what is none of it."""

    def __init__(self, stream: io.BufferedIOBase, encoding: str):
        self._stream, self._decoder, self._first = stream, codecs.getincrementaldecoder(encoding)(), True

    def _more(self) -> bytes:
        while raw := self._stream.read(HEAD):
            text = self._decoder.decode(raw)
            if self._first:
                text, self._first = text.removeprefix("\ufeff"), False
            if text:
                return text.encode()
        return self._decoder.decode(b"", final=True).encode()


class _Zstd(_Stream):
    """Decompressed bytes of a .zst file of any number of frames; raises EOFError where it ends inside one."""

    def __init__(self, file: BinaryIO):
        import zstandard

        self._new = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj
        self._file, self._frame, self._fed = file, self._new(), False

    def _more(self) -> bytes:
        while True:
            data = b""
            if self._frame.eof:
                data, self._frame, self._fed = self._frame.unused_data, self._new(), False
            data = data or self._file.read(FEED)
            if not data:
                if self._fed:
                    raise EOFError("the stream ends inside a frame")
                return b""
            self._fed = True
            if plain := self._frame.decompress(data):
                return plain

"""A data set of the Hub as a stream that is read once: what came is kept beside it until the set is prepared.

`hf:<dataset>[:<config>][?<field>=<value>]`: the train split; a local data set's directory works too. With `?` only
records whose field (such as meta.pile_set_name) has that value are taken. Long documents are cut as long text files
are. Texts lie in parts of about PART_BYTES, each with the state of the stream behind it, so that a second pass reads
them from the disk, and one that broke off goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_slm.errors import SlmError
from mlx_slm.files import Damaged, read_bytes
from mlx_slm.storage.records import fingerprint
from mlx_slm.text.readers import Reading, cut, text_field

PART_BYTES = 4 << 20
PART_RECORDS = 100_000
"""Of which few may be taken: so many are read again at the most."""
PART_LIMIT = 1 << 30


def read_hub(source: str, reading: Reading) -> Iterator[str]:
    """Yield the texts of a source; raises SlmError where it cannot be read."""
    import datasets

    address, _, condition = source.partition("?")
    _, name, *rest = address.split(":")
    if not name or (condition and "=" not in condition):
        raise SlmError(f"{source}: write it as hf:<dataset>, hf:<dataset>:<config> or hf:<dataset>?<field>=<value>")
    kept = (
        Kept(reading.streams / fingerprint([source, reading.text_field, reading.strict])[:16])
        if reading.streams
        else None
    )
    if kept:
        yield from kept.texts()
        if kept.is_whole:
            return
    try:
        stream = datasets.load_dataset(os.path.expanduser(name), *rest, split="train", streaming=True)
        if kept and kept.state:
            stream.load_state_dict(kept.state)
        yield from _texts(source, stream, condition, reading, kept)
    except SlmError:
        raise
    except Exception as error:  # of datasets, or of whichever library it reaches the network with
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        there = " what came is kept: the same command goes on from there" if kept and kept.parts else ""
        raise SlmError(
            f"{source}: cannot be read ({reason}); check the name and the network{there and ';' + there}"
        ) from error


def _texts(source: str, stream: Any, condition: str, reading: Reading, kept: Kept | None) -> Iterator[str]:
    part, size, index = list[str](), 0, -1
    try:
        for index, record in enumerate(stream):
            if not condition or _matches(record, condition, source):
                text = text_field(record, f"{source}, record {index}", reading)
                whole = [document for document in cut(text) if document and not document.isspace()]
                part += whole  # before the first is given out: its reader may have enough in the middle of a record
                size += sum(map(len, whole))
                yield from whole
            if kept and (size >= PART_BYTES or (index + 1) % PART_RECORDS == 0):
                kept.add(part, stream.state_dict())
                part, size = [], 0
    except GeneratorExit:  # its reader has enough
        if kept and part:
            kept.add(part, stream.state_dict())
        raise
    if kept:
        kept.add(part, None)


class Kept:
    """The texts of a stream on the disk. `state` is where the stream goes on, None before the first part."""

    def __init__(self, directory: Path):
        self.directory, self.parts, self.is_whole = directory, 0, False
        self.state: dict | None = None

    def texts(self) -> Iterator[str]:
        """Those of the parts that are whole; removes what comes behind one that is not."""
        import zstandard

        while (path := self._part(self.parts)).exists():
            try:
                part = json.loads(zstandard.ZstdDecompressor().decompress(read_bytes(path, PART_LIMIT)))
            except (zstandard.ZstdError, ValueError, Damaged):
                for later in self.directory.glob("*.zst"):
                    if int(later.stem) >= self.parts:
                        later.unlink()
                return
            self.parts, self.state, self.is_whole = self.parts + 1, part["state"], part["state"] is None
            yield from part["texts"]

    def add(self, texts: list[str], state: dict | None) -> None:
        """Write a part, whole or not at all; `state` is None at the stream's end."""
        import zstandard

        self.directory.mkdir(parents=True, exist_ok=True)
        data = json.dumps({"texts": texts, "state": state}).encode()
        new = self.directory / "new"
        with open(new, "wb") as file:
            file.write(zstandard.ZstdCompressor(write_checksum=True).compress(data))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._part(self.parts))
        self.parts, self.state, self.is_whole = self.parts + 1, state, state is None

    def _part(self, number: int) -> Path:
        return self.directory / f"{number:06d}.zst"


def _matches(record: dict, condition: str, source: str) -> bool:
    path, _, value = condition.partition("=")
    field = record
    for key in path.split("."):
        if not isinstance(field, dict) or key not in field:
            raise SlmError(f"{source}: its records have no field {path!r}; their fields: {', '.join(record)}")
        field = field[key]
    return str(field) == value

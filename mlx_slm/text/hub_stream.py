"""A data set of the Hub as a stream that is read once: what came is kept beside it until the set is prepared.

Long documents are cut as long text files are. Texts lie in parts of about PART_BYTES, each with the state of the stream
behind it, so that a second pass reads them from the disk, and one that broke off goes on, at the commit that it began
with.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import StrictStr

from mlx_slm.errors import SlmError
from mlx_slm.files import Damaged, read_bytes, read_json
from mlx_slm.hub import asks_to_wait, reason_of, said_by_the_hub
from mlx_slm.storage.records import fingerprint, write_json
from mlx_slm.text.hub_source import HubSource
from mlx_slm.text.readers import Reading, cut, text_field

PART_BYTES = 4 << 20
PART_RECORDS = 100_000
"""Of which few may be taken: so many are read again at the most."""
PART_LIMIT = 1 << 30
WAITS = (1, 4, 16)
"""Seconds before opening is tried again where the Hub asks to wait."""
REVISION = "revision.json"
T = TypeVar("T")


def read_hub(text: str, reading: Reading) -> Iterator[str]:
    """Yield the texts of a source; raises SlmError where it cannot be read. `reading.revisions` gets its commit."""
    source = HubSource.parse(text)
    kept = (
        Kept(reading.streams / fingerprint([text, reading.text_field, reading.strict])[:16])
        if reading.streams
        else None
    )
    if kept:
        yield from kept.texts()
        reading.revisions |= {text: kept.revision} if kept.revision else {}
        if kept.is_whole:
            return
    revision = kept.revision if kept else None
    if not source.is_directory and not revision:
        revision = _commit(source)
    if revision:
        reading.revisions[text] = revision
        if kept and not kept.parts:
            kept.begin(revision)
    try:
        stream = _patient(lambda: _opened(source, revision))
        if kept and kept.state:
            stream.load_state_dict(kept.state)
        yield from _texts(source, stream, reading, kept)
    except SlmError:
        raise
    except Exception as error:  # of datasets, or of whichever library it reaches the network with
        there = "; what came is kept: the same command goes on from there" if kept and kept.parts else ""
        do = "wait, or `hf auth login`" if asks_to_wait(error) else "check the name and the network"
        raise SlmError(f"{text}: cannot be read ({reason_of(error)}); {do}{there}") from error


def _commit(source: HubSource) -> str:
    """The commit that a revision is now; raises SlmError as the Hub says."""
    from huggingface_hub import HfApi

    def ask() -> str:
        return HfApi().dataset_info(source.name, revision=source.revision).sha or ""

    with said_by_the_hub(source.text, source.name, source.revision, "dataset"):
        return _patient(ask)


def _opened(source: HubSource, revision: str | None) -> Any:
    import datasets

    files = {source.split: list(source.files)} if source.files else None
    name, config = os.path.expanduser(source.name), [source.config] if source.config else []
    return datasets.load_dataset(name, *config, split=source.split, data_files=files, revision=revision, streaming=True)


def _patient(ask: Callable[[], T]) -> T:
    """The answer, asked for again after a while where there were too many requests."""
    for wait in WAITS:
        try:
            return ask()
        except Exception as error:
            if not asks_to_wait(error):
                raise
            time.sleep(wait)
    return ask()


def _texts(source: HubSource, stream: Any, reading: Reading, kept: Kept | None) -> Iterator[str]:
    part, size, index = list[str](), 0, -1
    try:
        for index, record in enumerate(stream):
            if source.takes(record, source.text):
                text = text_field(record, f"{source.text}, record {index}", reading)
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
        self.revision: str | None = None
        try:
            self.revision = read_json(directory / REVISION, StrictStr) if (directory / REVISION).exists() else None
        except Damaged:
            shutil.rmtree(directory)

    def begin(self, revision: str) -> None:
        """Note the commit that the parts are of."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self.directory / REVISION, revision)
        self.revision = revision

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

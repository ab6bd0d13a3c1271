"""Sources -> the distinct documents of a set, each in one split.

A document's split depends on the hash of its text alone, so it stays where it is when the set grows; but for a split
that would be empty, which gets the document that is nearest to it. Texts that differ in white space alone are one
document.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_slm.config.schema import Config
from mlx_slm.errors import SlmError
from mlx_slm.text.readers import Reading
from mlx_slm.text.sources import Source


@dataclass
class Counts:
    """What was read: documents and bytes kept, and duplicates left out."""

    documents: int = 0
    bytes: int = 0
    training_bytes: int = 0
    duplicates: int = 0


class Documents:
    """The distinct documents of a set as (digest, text, split), in a fixed order: held-out sources first.

    A text that stands in a held-out source and in the training source is kept where it is held out. `placed`: the
    splits of some documents, by their digests, whatever their hashes say.
    """

    def __init__(self, sources: list[Source], config: Config, reading: Reading, placed: dict[bytes, str] | None = None):
        self.sources = sorted(sources, key=lambda s: {"test": 0, "valid": 1}.get(s.split or "", 2))
        self.reading, self.counts = reading, Counts()
        self._config, self._data, self.placed = config, config.data, placed or {}
        self._of_split: Counter[str] = Counter()
        self._held_out_last: bytes | None = None
        self._trained_first: list[bytes] = []
        self._stopped = False
        """Whether the limit ended the reading."""
        remote = any(source.remote for source in sources)
        self._size = None if remote else sum(p.stat().st_size for source in sources for p in source.files())

    def expected_bytes(self) -> float | None:
        """Bytes of text that there will be, guessed from what was read so far; None where nothing tells."""
        position = self.reading.position
        guess = self.counts.bytes * self._size / position if self._size and position else None
        return min(filter(None, (guess, self._data.limit)), default=None)

    def __iter__(self) -> Iterator[tuple[bytes, str, str]]:
        seen: set[bytes] = set()
        counts = self.counts = Counts()
        self._of_split, self._held_out_last, self._trained_first = Counter(), None, []
        self._stopped = False
        for source in self.sources:
            for text in source.documents(self.reading):
                digest = hashlib.blake2b("".join(text.split()).encode(), digest_size=12).digest()
                if digest in seen:
                    counts.duplicates += 1
                    continue
                seen.add(digest)
                counts.documents += 1
                counts.bytes += len(text.encode())
                split = source.split or self._split(digest)
                self._of_split[split] += 1
                if not source.split:
                    self._note(digest, split)
                counts.training_bytes += len(text.encode()) if split == "train" else 0
                yield digest, text, split
                if self._data.limit and counts.training_bytes >= self._data.limit:
                    self._stopped = True
                    return

    def in_every_split(self) -> Documents:
        """The same with a document in each split that chance left empty: the one that is nearest to being there, and
        for the held-out splits only while training keeps one; itself where none is. Raises SlmError where there is
        nothing to train on."""
        placed = dict(self.placed)
        if not self._of_split["train"]:
            if self._held_out_last is None:
                named = ", ".join(source.text for source in self.sources)
                raise SlmError(f"{named}: no text to train on: name some with train=PATH")
            placed[self._held_out_last] = "train"
        wanted = [split for split, share, given in reversed(self._shares()) if share and not given]
        empty = [split for split in wanted if not self._of_split[split]]
        most = len(empty) if self._stopped else self._of_split["train"] - 1  # more is read where the limit stopped it
        for digest, split in zip(self._trained_first[:most], empty, strict=False):
            placed[digest] = split
        return self if placed == self.placed else self.again(placed)

    def again(self, placed: dict[bytes, str] | None = None) -> Documents:
        """The same, or others `placed`, to be read and counted from the start."""
        reading = dataclasses.replace(self.reading, replaced=0, empty_files=[], left_out=Counter(), bytes_read=0)
        return Documents(self.sources, self._config, reading, self.placed if placed is None else placed)

    def _note(self, digest: bytes, split: str) -> None:
        if split == "train":
            self._trained_first = sorted([*self._trained_first, digest], key=_place)[:2]
        else:
            self._held_out_last = max(self._held_out_last or digest, digest, key=_place)

    def _shares(self) -> list[tuple[str, float, bool]]:
        """(split, its share of the hashes, whether a source is given for it) of what is held out."""
        given = {source.split for source in self.sources}
        shares = (("test", self._data.test_fraction), ("valid", self._data.valid_fraction))
        return [(split, share, split in given) for split, share in shares]

    def _split(self, digest: bytes) -> str:
        """By hash, into the splits that no source is given for."""
        if digest in self.placed:
            return self.placed[digest]
        place = _place(digest)
        for split, share, given in self._shares():
            if 0 <= place < share and not given:
                return split
            place -= share
        return "train"


def _place(digest: bytes) -> float:
    """Where a document lies between 0 (held out first) and 1."""
    return int.from_bytes(digest[:8], "big") / 2**64

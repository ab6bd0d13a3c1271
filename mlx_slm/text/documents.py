"""Sources -> the distinct documents of a set, each in one split.

A document's split depends on the hash of its text alone, so it stays where it is when the set grows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_slm.config import Config
from mlx_slm.text.sources import Reading, Source


@dataclass
class Counts:
    """What was read: documents and bytes kept, and exact duplicates left out."""

    documents: int = 0
    bytes: int = 0
    training_bytes: int = 0
    duplicates: int = 0


class Documents:
    """The distinct documents of a set as (digest, text, split), in a fixed order: held-out sources first.

    A text that stands in a held-out source and in the training source is kept where it is held out.
    """

    def __init__(self, sources: list[Source], config: Config, reading: Reading):
        self.sources = sorted(sources, key=lambda s: {"test": 0, "valid": 1}.get(s.split, 2))
        self.reading, self.counts = reading, Counts()
        self._data = config.data
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
        for source in self.sources:
            for text in source.documents(self.reading):
                digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
                if digest in seen:
                    counts.duplicates += 1
                    continue
                seen.add(digest)
                counts.documents += 1
                counts.bytes += len(text.encode())
                split = source.split or self._split(digest)
                counts.training_bytes += len(text.encode()) if split == "train" else 0
                yield digest, text, split
                if self._data.limit and counts.training_bytes >= self._data.limit:
                    return

    def _split(self, digest: bytes) -> str:
        """By hash, into the splits that no source is given for."""
        place = int.from_bytes(digest[:8], "big") / 2**64
        given = {source.split for source in self.sources}
        for split, fraction in (("test", self._data.test_fraction), ("valid", self._data.valid_fraction)):
            if 0 <= place < fraction and split not in given:
                return split
            place -= fraction
        return "train"

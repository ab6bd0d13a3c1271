"""Sources -> the distinct documents of a set, each in one split.

A document's split depends on the hash of its text alone, so it stays where it is when the set grows. Texts that differ
in white space alone are one document.
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

    A text that stands in a held-out source and in the training source is kept where it is held out. The document of
    the digest `training` is a training document whatever its hash says.
    """

    def __init__(self, sources: list[Source], config: Config, reading: Reading, training: bytes | None = None):
        self.sources = sorted(sources, key=lambda s: {"test": 0, "valid": 1}.get(s.split or "", 2))
        self.reading, self.counts = reading, Counts()
        self._config, self._data, self._training = config, config.data, training
        self._nearest: bytes | None = None
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
                digest = hashlib.blake2b("".join(text.split()).encode(), digest_size=12).digest()
                if digest in seen:
                    counts.duplicates += 1
                    continue
                seen.add(digest)
                counts.documents += 1
                counts.bytes += len(text.encode())
                split = source.split or self._split(digest)
                if split != "train" and not source.split:
                    self._nearest = max(self._nearest or digest, digest, key=_place)
                counts.training_bytes += len(text.encode()) if split == "train" else 0
                yield digest, text, split
                if self._data.limit and counts.training_bytes >= self._data.limit:
                    return

    def with_training_text(self) -> Documents:
        """The same, with one document to train on: of those that chance held out, all of them there were, the one that
        is nearest to being a training document. Raises SlmError where there is none."""
        if self._nearest is None:
            raise SlmError(f"{', '.join(s.text for s in self.sources)}: no text to train on: name some with train=PATH")
        reading = dataclasses.replace(self.reading, replaced=0, empty_files=[], left_out=Counter(), bytes_read=0)
        return Documents(self.sources, self._config, reading, self._nearest)

    def _split(self, digest: bytes) -> str:
        """By hash, into the splits that no source is given for."""
        if digest == self._training:
            return "train"
        place = _place(digest)
        given = {source.split for source in self.sources}
        for split, fraction in (("test", self._data.test_fraction), ("valid", self._data.valid_fraction)):
            if 0 <= place < fraction and split not in given:
                return split
            place -= fraction
        return "train"


def _place(digest: bytes) -> float:
    """Where a document lies between 0 (held out first) and 1."""
    return int.from_bytes(digest[:8], "big") / 2**64

"""Memory-mapped arrays whose bytes are checked when they are first touched."""

from __future__ import annotations

import mmap
import os
import zlib
from pathlib import Path

import numpy as np

from mlx_slm.files import Damaged

SHORT = 4096
"""Elements that are read, not mapped: one number of a mapped file can make two megabytes of it resident."""


class MappedFile:
    """A memory-mapped array whose blocks are checked against their crc32 when they are first touched.

    A check reads its block into memory of its own, so that pages which nobody looks at are not mapped.
    """

    def __init__(self, path: Path, dtype, entry: dict):
        self.path, self.dtype = path, np.dtype(dtype)
        self._crc, self._block, self._bytes = entry["crc32"], entry["block"], entry["bytes"]
        self._file = open(path, "rb", buffering=0)
        self._array = np.zeros(0, self.dtype)
        if entry["bytes"]:
            self._array = np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), self.dtype)
        self._seen = np.zeros(len(self._crc), bool)

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index):
        """An element or a slice with step 1, as numpy would give it."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise IndexError("a mapped file has no slices with a step")
        else:
            start = index + len(self) if index < 0 else index
            stop = start + 1
            if not 0 <= start < len(self):
                raise IndexError(f"element {index} of {len(self)}")
        if 0 < stop - start <= SHORT:
            values = self.read(start, stop)
            return values if isinstance(index, slice) else values[0]
        self._require(start, stop)
        return self._array[index]

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of the elements from `start` to `stop`, of which nothing stays mapped."""
        self._require(start, stop)
        size = self.dtype.itemsize
        return np.frombuffer(self._read(start * size, (stop - start) * size), self.dtype)

    def read_each(self, starts: np.ndarray, length: int) -> np.ndarray:
        """[len(starts), length]: copies of as many elements from each start, of which nothing stays mapped."""
        places = np.asarray(starts, np.int64) * self.dtype.itemsize
        values = np.empty((len(places), length), self.dtype)
        for block in np.unique([places // self._block, (places + values.strides[0] - 1) // self._block]):
            self._check(block, block)
        for row, place in zip(values, places.tolist(), strict=True):
            if os.preadv(self._file.fileno(), [row], place) != row.nbytes:
                raise self._cut_off()
        return values

    def _require(self, start: int, stop: int) -> None:
        """Check the blocks of these elements that were not checked yet."""
        if os.fstat(self._file.fileno()).st_size < self._bytes:  # a mapped page beyond the end would be a bus error
            raise self._cut_off()
        if stop > start:
            size = self.dtype.itemsize
            first, last = start * size // self._block, (stop * size - 1) // self._block
            if not self._seen[first : last + 1].all():
                self._check(first, last)

    def _read(self, start: int, size: int) -> bytes:
        data = os.pread(self._file.fileno(), size, start)
        if len(data) != size:
            raise self._cut_off()
        return data

    def _cut_off(self) -> Damaged:
        return Damaged(f"{self.path} was cut off while it was in use; make {self.path.parent} again")

    def _check(self, first: int, last: int) -> None:
        for block in range(first, last + 1):
            if self._seen[block]:
                continue
            data = self._read(block * self._block, min(self._block, self._bytes - block * self._block))
            if zlib.crc32(data) != self._crc[block]:
                raise Damaged(
                    f"{self.path} is damaged in bytes {block * self._block}-{block * self._block + len(data)}; "
                    f"remove {self.path.parent} and prepare it again"
                )
            self._seen[block] = True

"""Windows -> training rows of one shape, drawn from any distribution over clusters.

A cluster's windows, in order, form an endless cyclic stream, with a `</s>` between two windows where the first does not
end in one. With T = context_length, row i holds the stream's tokens [iT, iT+T]: rows overlap by one token, so that each
stored token is a target exactly once per pass.

    windows   a b c </s> | d e      (T = 4)
    stream    a b c </s> d e <s>    <s> is the separator: `</s>` as input, never a target
    row 0     a b c </s> d          inputs a b c </s>, targets b c </s> d
    row 1     d e <s> a b           inputs d e <s> a,  targets e - a -    (- has weight 0)

The rows of step s depend on (seed, s) alone: never on the micro-batch or on the number of devices.
"""

from __future__ import annotations

import bisect
import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlx_slm.text.store import Store

MASK = 2**64 - 1


class Stream:
    """The cyclic stream of all windows of a store, or of the windows order[first:last] in that order.

    `ends[i]` is the stream's length up to the end of order[i] (`separated_ends`), counted from the start of `order`;
    `order` and `ends` are arrays or memory-mapped, so that opening costs the same for any size.
    """

    def __init__(self, store: Store, order=None, ends=None, first: int = 0, last: int | None = None):
        self.store, self.row_length = store, store.context_length
        self._order, self._ends, self._first = order, ends, first
        if order is None:
            self.num_windows = store.num_windows
            self.length = store.num_tokens + store.num_windows - store.num_documents
        else:
            self.num_windows = (len(order) if last is None else last) - first
            self._before = int(ends[first - 1]) if first else 0
            self.length = int(ends[first + self.num_windows - 1]) - self._before if self.num_windows else 0
        self.num_rows = -(-self.length // self.row_length)

    @classmethod
    def of(cls, store: Store, windows: np.ndarray) -> Stream:
        """The stream of the given windows."""
        return cls(store, windows, separated_ends(store, windows))

    def window(self, index: int) -> int:
        """The number in the store of window `index` of this stream."""
        return index if self._order is None else int(self._order[self._first + index])

    def start(self, index: int) -> int:
        """Where window `index` of this stream begins. For a whole store: its offset plus the separators before it."""
        if self._order is None:
            window = self.store.windows[index]
            return int(window["offset"]) + index - int(window["document"])
        place = self._first + index
        return int(self._ends[place - 1]) - self._before if index else 0

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens int32 [T+1], weights float32 [T]: 1 where the target counts)."""
        length = self.row_length
        tokens = np.full(length + 1, self.store.eos_id, np.int32)
        stored = np.zeros(length + 1, bool)
        begin = index * length
        number = bisect.bisect_right(range(self.num_windows), begin, key=self.start) - 1
        skip = begin - self.start(number)
        filled = 0
        while filled <= length:
            ids = self.store.window_tokens(self.window(number))
            taken = ids[skip : skip + length + 1 - filled]
            tokens[filled : filled + len(taken)] = taken
            stored[filled : filled + len(taken)] = True
            following = (number + 1) % self.num_windows
            size = (self.start(following) if following else self.length) - self.start(number)
            filled += size - skip
            number, skip = following, 0
        weights = stored[1:] & (begin + 1 + np.arange(length) <= self.length)
        return tokens, weights.astype(np.float32)


def separated_ends(store: Store, windows: np.ndarray) -> np.ndarray:
    """Cumulative lengths of windows, each with a separator behind it unless it ends its document: int64 [windows]."""
    facts = store.windows[:]
    is_last = np.append(facts["document"][1:] != facts["document"][:-1], True)[: len(facts)]
    ends = facts["length"][windows].astype(np.int64)
    ends += ~is_last[windows]
    return np.cumsum(ends, out=ends)


@dataclass(frozen=True)
class Phase:
    """A distribution over streams that holds from a step on."""

    begin: int
    distribution: np.ndarray


class Sampler:
    """Rows of step s: clusters by systematic sampling over `distribution`, then the next rows of each cluster.

    `rows_per_cluster` rows of one cluster are drawn together. No row of a cluster repeats within a pass over it.
    `later`: other distributions, each from its step on.
    """

    def __init__(
        self,
        streams: list[Stream],
        distribution: np.ndarray,
        batch_rows: int,
        seed: int,
        rows_per_cluster: int = 1,
        later: tuple[Phase, ...] = (),
    ):
        if batch_rows % rows_per_cluster:
            raise ValueError(f"batch_rows {batch_rows} is not a multiple of rows_per_cluster {rows_per_cluster}")
        self.streams, self.seed, self.rows_per_cluster = streams, seed, rows_per_cluster
        self.groups = batch_rows // rows_per_cluster
        phases = sorted([Phase(0, distribution), *later], key=lambda phase: phase.begin)
        self._begins = [phase.begin for phase in phases]
        self._masses = [np.asarray(phase.distribution, np.float64) / np.sum(phase.distribution) for phase in phases]
        self._step, self._drawn = 0, np.zeros(len(streams), np.int64)

    @property
    def row_length(self) -> int:
        """Target tokens of a row."""
        return self.streams[0].row_length

    @property
    def num_rows(self) -> int:
        """Rows of one pass over everything."""
        return sum(stream.num_rows for stream in self.streams)

    def changing_at(self, step: int) -> Sampler:
        """The same with its last phase from another step on."""
        other = copy.copy(self)
        other._begins = [*self._begins[:-1], step] if len(self._begins) > 1 else self._begins
        other._step, other._drawn = 0, np.zeros_like(self._drawn)
        return other

    def distribution(self, step: int) -> np.ndarray:
        """The share of each stream in the rows of a step, float64 [streams]."""
        return self._masses[bisect.bisect_right(self._begins, step) - 1]

    def clusters(self, step: int) -> np.ndarray:
        """The cluster of each group of a step, int [groups]: each count is its expectation rounded up or down."""
        count = len(self.streams)
        if count == 1:
            return np.zeros(self.groups, np.int64)
        rng = np.random.default_rng((self.seed, step))
        order = rng.permutation(count)
        edges = np.cumsum(self.distribution(step)[order])
        points = (rng.random() + np.arange(self.groups)) / self.groups * edges[-1]
        return order[np.minimum(np.searchsorted(edges, points, side="right"), count - 1)]

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | Soup]:
        """Return (tokens int32 [B, T+1], weights float32 [B, T], `experts`) of a step."""
        drawn = self._drawn_before(step)
        rows = []
        for cluster in self.row_clusters(step):
            stream = self.streams[cluster]
            done, place = divmod(int(drawn[cluster]), stream.num_rows)
            key = mix(mix(mix(self.seed) ^ int(cluster)) ^ done)
            rows.append(stream.row(permuted(place, stream.num_rows, key)))
            drawn[cluster] += 1
        self._step, self._drawn = step + 1, drawn
        tokens, weights = zip(*rows, strict=True)
        return np.stack(tokens), np.stack(weights), self.experts(step)

    def row_clusters(self, step: int) -> np.ndarray:
        """The cluster of each row of a step, int [B]."""
        return np.repeat(self.clusters(step), self.rows_per_cluster)

    def experts(self, step: int) -> np.ndarray | Soup:
        """The expert of each group of a step: that of its cluster, int [groups]."""
        return self.clusters(step)

    def _drawn_before(self, step: int) -> np.ndarray:
        """Rows taken from each cluster before `step`, replayed from the seed where they are not at hand."""
        if len(self.streams) == 1:
            return np.array([step * self.groups * self.rows_per_cluster], np.int64)
        known, drawn = (self._step, self._drawn.copy()) if self._step <= step else (0, np.zeros_like(self._drawn))
        for earlier in range(known, step):
            drawn += np.bincount(self.row_clusters(earlier), minlength=len(drawn))
        return drawn


class Soup(NamedTuple):
    """Combinations of experts: sum_j shares[g, j] E[clusters[g, j]] for group g; both [groups, n], shares sum to 1."""

    clusters: np.ndarray
    shares: np.ndarray


class SoupSampler(Sampler):
    """Rows for combinations of experts: for the part `soup` of the groups a histogram over `FEW` clusters is drawn from
    a Dirichlet distribution, and their rows from that histogram.

    The clusters are drawn from `distribution`, the shares uniformly. The first row's cluster c is the plain sampler's:
    given it, the shares are of Dirichlet(2, 1, ..., 1), c's first, so that all rows still are of `distribution`.
    """

    FEW = 8

    def __init__(self, *args: Any, soup: float, **options: Any):
        super().__init__(*args, **options)
        self.soup = soup

    def experts(self, step: int) -> Soup:
        """The experts that each group combines; those that are not mixed have one."""
        return self._drawn_of(step)[0]

    def row_clusters(self, step: int) -> np.ndarray:
        return self._drawn_of(step)[1]

    def _drawn_of(self, step: int) -> tuple[Soup, np.ndarray]:
        first, masses = self.clusters(step), self.distribution(step)
        rng = np.random.default_rng((self.seed, step, 1))
        mixed = rng.permutation(self.groups) < math.floor(self.soup * self.groups + rng.random())
        others = rng.choice(len(masses), (self.groups, self.FEW - 1), p=masses)
        clusters = np.concatenate([first[:, None], others], axis=1)
        shares = rng.dirichlet([2.0] + [1.0] * (self.FEW - 1), self.groups)
        shares[~mixed] = np.eye(1, self.FEW)
        drawn = [rng.choice(one, self.rows_per_cluster, p=p) for one, p in zip(clusters, shares, strict=True)]
        rows = np.stack(drawn)
        rows[:, 0] = first
        return Soup(clusters, shares.astype(np.float32)), rows.reshape(-1)


def mix(value: int) -> int:
    """A 64-bit mixing function (splitmix64's): close inputs give unrelated outputs."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def permuted(index: int, size: int, key: int) -> int:
    """Where `index` goes in the permutation of range(size) that `key` names, in O(1) memory.

    A Feistel network over the next even power of two, walked along its cycle until it falls below `size`.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(4):
            left, right = right, left ^ (mix(key ^ (turn << 56) ^ right) & low)
        index = left << half | right
        if index < size:
            return index

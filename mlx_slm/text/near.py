"""Near-duplicates among documents: most of their runs of SHINGLE tokens are the same.

MinHash finds candidates (Broder 1997), their shingles themselves decide. Works on the ids of stores, so on any prepared
set; white space that tokens hold counts, and documents shorter than a shingle are not compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_slm.text.store import Store

SHINGLE = 8
"""Tokens, about five words."""
SIMILAR = 0.8
"""Jaccard similarity of the shingles from which on two documents are near-duplicates."""
PERMUTATIONS = 64
BANDS = 16
"""Of 4 permutations each: a pair of similarity 0.8 shares none with probability (1 - 0.8^4)^16 = 0.0002."""
NEIGHBOURS = 3
"""Of documents that share a band each is compared with the first, and with this many before it."""
MOST_DOCUMENTS = 1_000_000
"""Signatures that are held at once, 256 bytes each; the last documents beyond them are not compared."""
BLOCK_TOKENS = 4_000_000


@dataclass(frozen=True)
class Near:
    """`earlier[s]`: for each document of store s the number, over all stores, of one before that it resembles, or -1;
    `starts[s]`: the number of the store's first document; `compared`: documents that were looked at."""

    earlier: list[np.ndarray]
    starts: np.ndarray
    compared: int

    def count(self, store: int, of: Sequence[int]) -> int:
        """Documents of a store that resemble one of the stores `of`."""
        return int(self.marked(store, of).sum())

    def marked(self, store: int, of: Sequence[int]) -> np.ndarray:
        """Which documents of a store those are, bool [documents]."""
        found = self.earlier[store]
        whose = np.searchsorted(self.starts, found, side="right") - 1
        return (found >= 0) & np.isin(whose, list(of))


def near_duplicates(stores: Sequence[Store]) -> Near:
    """Compare all documents of stores of one tokenizer, each with those before it in this order."""
    counts = np.array([store.num_documents for store in stores], np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(counts) else np.zeros(0, np.int64)
    signatures, comparable = _signatures(stores)
    earlier = np.full(int(counts.sum()), -1, np.int64)
    places = [store.documents() for store in stores]

    def shingles(document: int) -> np.ndarray:
        store = int(np.searchsorted(starts, document, side="right")) - 1
        offset, length = places[store][document - int(starts[store])]
        return np.unique(hashes(stores[store].tokens[int(offset) : int(offset) + int(length)]))

    for first, second in _candidates(signatures, comparable):
        if earlier[second] >= 0 and earlier[second] <= first:
            continue
        one, other = shingles(int(first)), shingles(int(second))
        shared = len(np.intersect1d(one, other, assume_unique=True))
        if shared >= SIMILAR * (len(one) + len(other) - shared):
            earlier[second] = first
    return Near(np.split(earlier, starts[1:]), starts, len(signatures))


def hashes(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each run of SHINGLE tokens, uint64 [tokens - SHINGLE + 1]."""
    ids = np.asarray(tokens).astype(np.uint64)
    count = max(0, len(ids) - SHINGLE + 1)
    value = np.zeros(count, np.uint64)
    for i in range(SHINGLE):
        value = (value ^ ids[i : i + count]) * np.uint64(0x9E3779B97F4A7C15)
        value ^= value >> np.uint64(29)
    return value


def _signatures(stores: Sequence[Store]) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 [documents, PERMUTATIONS], which are long enough to be compared)."""
    from rensa import RMinHash

    parts, long_enough, left = [np.zeros((0, PERMUTATIONS), np.uint32)], [np.zeros(0, bool)], MOST_DOCUMENTS
    for store in stores:
        for places in _blocks(store.documents()[:left]):
            rows = [hashes(store.tokens[int(start) : int(start + length)]) for start, length in places]
            offsets = np.cumsum([0, *map(len, rows)], dtype=np.uint64)
            flat = np.concatenate([*rows, np.zeros(0, np.uint64)])
            matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, PERMUTATIONS, 0)
            parts.append(np.array(matrix.to_rows(), np.uint32).reshape(-1, PERMUTATIONS))
            long_enough.append(np.diff(offsets) > 0)
        left -= min(left, store.num_documents)
    return np.concatenate(parts), np.concatenate(long_enough)


def _blocks(places: np.ndarray) -> Iterator[np.ndarray]:
    """Documents in their order, about BLOCK_TOKENS tokens at a time."""
    if len(places):
        yield from np.split(places, np.flatnonzero(np.diff(np.cumsum(places[:, 1]) // BLOCK_TOKENS)) + 1)


def _candidates(signatures: np.ndarray, comparable: np.ndarray) -> np.ndarray:
    """Pairs (earlier, later) that share a band and look alike by their signatures, int64 [pairs, 2], in order."""
    documents, width = np.flatnonzero(comparable), PERMUTATIONS // BANDS
    pairs = [np.zeros((0, 2), np.int64)]
    for band in range(BANDS):
        rows = signatures[documents, band * width : (band + 1) * width]
        keys = np.ascontiguousarray(rows).view(np.dtype((np.void, 4 * width))).ravel()
        order = np.argsort(keys, kind="stable")
        same = np.concatenate([[False], keys[order][1:] == keys[order][:-1]])
        begins = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
        for back in (*range(1, NEIGHBOURS + 1), None):
            other = begins if back is None else np.arange(len(order)) - back
            chosen = np.flatnonzero(same & (other >= begins) & (other != np.arange(len(order))))
            pairs.append(documents[np.stack([order[other[chosen]], order[chosen]], axis=1)])
    unique = np.unique(np.concatenate(pairs), axis=0)
    alike = [
        signatures[part[:, 0]] == signatures[part[:, 1]] for part in np.array_split(unique, len(unique) // 10_000 + 1)
    ]
    share = np.concatenate([part.mean(axis=1) for part in alike]) if len(unique) else np.zeros(0)
    return unique[share >= SIMILAR - 0.2]

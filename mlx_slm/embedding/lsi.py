"""Latent semantic indexing: hashed word counts, tf-idf, randomised SVD in MLX. Needs no download.

A text is its words (lower case, hashed to `BUCKETS`; pairs of characters where a script has no spaces between words),
weighted by (1 + log count) * idf, normalised, and projected onto
the leading right singular vectors of a sample of the generic set (Halko, Martinsson and Tropp, 2011).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_slm.files import Damaged, read_arrays, write_arrays
from mlx_slm.report import Report

BUCKETS = 1 << 14
PROJECTION = "lsi.safetensors"
UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf"
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff"
    "\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U000323af"
)
"""Scripts whose words no space divides: Thai, Lao, Tibetan, Burmese, Khmer, Tai, Chinese and Japanese."""
MARKS = "\u0300-\u036f\u0483-\u0487\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u06d6-\u06ed\u0900-\u0963\u0966-\u0dff"
"""Signs within a word that are no letters: accents and points, the vowel signs of India's scripts."""
WORD = re.compile(rf"[{UNSPACED}]+|(?:(?![{UNSPACED}])[\w{MARKS}]){{2,}}")
UNSPACED_RUN = re.compile(rf"[{UNSPACED}]")
CHUNK = 512
REMEMBERED = 1_000_000
"""Words whose buckets are kept at hand."""
OVERSAMPLING, POWERS = 32, 3


class LsiEncoder:
    """The directory that `fit` wrote: `projection` fp32 [BUCKETS, dims] and `idf` fp32 [BUCKETS]."""

    shard_windows = 16_384
    long_windows = "mean"

    def __init__(self, directory: Path):
        arrays = read_arrays(Path(directory) / PROJECTION, {"idf": 1, "projection": 2})
        self._idf = arrays["idf"]
        if arrays["projection"].shape[0] != BUCKETS or len(self._idf) != BUCKETS:
            raise Damaged(f"{Path(directory) / PROJECTION} is not the projection of an lsi encoder")
        self._projection = mx.array(arrays["projection"])
        self.dims = arrays["projection"].shape[1]
        self._words = Words()

    def encode(self, texts: list[str]) -> np.ndarray:
        """Embeddings of texts, fp32 [texts, dims], of length 1; a text without known words is all zero."""
        parts = [np.empty((0, self.dims), np.float32)]
        for start in range(0, len(texts), CHUNK):
            dense = weighted(*self._words.counts(texts[start : start + CHUNK]), self._idf)
            vectors = np.array(mx.array(dense) @ self._projection)
            parts.append(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6))
        return np.concatenate(parts)

    def unknown(self, texts: list[str]) -> float:
        """The share of words that it does not know: none, for it hashes them."""
        return 0.0


def words_of(text: str) -> Iterator[str]:
    """The words of a text in lower case; of a run without spaces each pair of neighbours (and one that is alone)."""
    for word in WORD.findall(text.lower()):
        if UNSPACED_RUN.match(word) and len(word) > 2:
            yield from map("".join, pairwise(word))
        else:
            yield word


class Words:
    """Texts -> buckets of words, remembered."""

    def __init__(self):
        self._bucket: dict[str, int] = {}

    def counts(self, texts: list[str]) -> tuple[int, np.ndarray, np.ndarray]:
        """Return (rows, place [n] = row * BUCKETS + bucket, count [n]) of the words that occur."""
        if len(self._bucket) > REMEMBERED:
            self._bucket.clear()
        known, places = self._bucket, []
        for row, text in enumerate(texts):
            for word in words_of(text):
                bucket = known.get(word)
                if bucket is None:
                    bucket = known[word] = zlib.crc32(word.encode()) % BUCKETS
                places.append(row * BUCKETS + bucket)
        return len(texts), *np.unique(np.array(places, np.int64), return_counts=True)


def weighted(rows: int, places: np.ndarray, counts: np.ndarray, idf: np.ndarray) -> np.ndarray:
    """tf-idf rows of length 1, fp32 [rows, BUCKETS]; a row without words is zero."""
    row, bucket = np.divmod(places, BUCKETS)
    values = (1 + np.log(counts)) * idf[bucket]
    norms = np.sqrt(np.bincount(row, values**2, minlength=rows))
    dense = np.zeros(rows * BUCKETS, np.float32)
    dense[places] = values / np.maximum(norms, 1e-12)[row]
    return dense.reshape(rows, BUCKETS)


def fit(texts: list[str], dims: int, seed: int, directory: Path, report: Report) -> None:
    """Write the projection of a sample of texts to `directory`. Deterministic for texts and seed."""
    words = Words()
    chunks = [words.counts(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
    documents = np.zeros(BUCKETS)
    for _, places, _ in chunks:
        documents += np.bincount(places % BUCKETS, minlength=BUCKETS)
    idf = (np.log((1 + len(texts)) / (1 + documents)) + 1).astype(np.float32)
    rng = np.random.default_rng(seed)
    width = min(dims + OVERSAMPLING, len(texts))
    basis = rng.standard_normal((BUCKETS, width)).astype(np.float32)
    with report.progress("fitting lsi", (POWERS + 1) * len(texts), " texts") as advance:
        for power in range(POWERS + 1):
            right = mx.array(np.linalg.qr(basis)[0])
            product, gram = mx.zeros((BUCKETS, width)), mx.zeros((width, width))
            for chunk in chunks:
                dense = mx.array(weighted(*chunk, idf))
                left = dense @ right
                if power < POWERS:
                    product = product + dense.T @ left
                else:
                    gram = gram + left.T @ left
                mx.eval(product, gram)
                advance(chunk[0])
            basis = np.array(product)
    values, vectors = np.linalg.eigh(np.array(gram, np.float64))
    leading = vectors[:, np.argsort(-values)[:dims]]
    projection = np.array(right) @ leading.astype(np.float32)
    write_arrays(directory / PROJECTION, {"projection": np.ascontiguousarray(projection), "idf": idf})

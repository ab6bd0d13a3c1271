"""A tree of clusters, for a k too large for flat k-means: each level splits every cluster of the level above it.

A window goes down from level to level, to the nearest centroid among the branches of its cluster: that costs the sum of
the branches, not their product. The clusters of a level nest in those of the level above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np

from mlx_slm.clustering.kmeans import nearest, scorer
from mlx_slm.machine import runtime


def with_levels_above(counts: Sequence[int], branches: Sequence[int]) -> list[list[int]]:
    """For each number of clusters that `counts` need, the numbers of a tree's levels down to it, itself the last.

    Those above come first; one that is no level of the tree is alone.
    """
    levels = [math.prod(branches[: depth + 1]) for depth in range(len(branches))]
    ways = {tuple(levels[: depth + 1]) for k in counts if k in levels for depth in range(levels.index(k) + 1)}
    return [list(way) for way in sorted({*ways, *((k,) for k in counts if k not in levels)}, key=_depth)]


def _depth(way: tuple[int, ...]) -> tuple:
    return len(way), way


def descend(points: mx.array, levels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (clusters int32 [n], scores fp32 [n]: x.c - |c|^2 / 2) of points fp32 [n, dims] at the last of `levels`,
    centroids fp32 [k, dims] each."""
    places, scores = nearest(points, levels[0])
    for above, level in pairwise(levels):
        places, scores = _step_down(points, places, level.reshape(len(above), -1, level.shape[1]))
    return places, scores


def _step_down(points: mx.array, parents: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the clusters of one level to those of the next, centroids [clusters above, branches, dims]."""
    order = np.argsort(parents, kind="stable")
    bounds = np.searchsorted(parents[order], np.arange(len(centroids) + 1))
    places, scores = np.empty(len(parents), np.int32), np.empty(len(parents), np.float32)

    def best(lane: int, parent: int) -> tuple[mx.array, mx.array]:
        own = points[mx.array(order[bounds[parent] : bounds[parent + 1]])]
        closeness = scorer(centroids[parent])(own)
        return mx.argmax(closeness, axis=-1), mx.max(closeness, axis=-1)

    for parent, (place, score) in runtime.in_lanes(np.flatnonzero(np.diff(bounds)), best):
        own = order[bounds[parent] : bounds[parent + 1]]
        places[own], scores[own] = parent * centroids.shape[1] + np.array(place), score
    return places, scores


def assign(chunks: Iterator[np.ndarray], levels: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each chunk of points fp32 [n, dims] yield (clusters int32 [n], squared distances fp32 [n])."""
    for chunk in chunks:
        places, scores = descend(mx.array(chunk), levels)
        yield places, np.maximum(np.einsum("nd,nd->n", chunk, chunk) - 2 * scores, 0)

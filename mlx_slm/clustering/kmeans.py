"""k-means in MLX: greedy k-means++, then Lloyd's iterations with chunked assignment (section 2.3).

A point x is nearest to the centroid with the largest score x.c - |c|^2 / 2, so an assignment is one matrix product and
an argmax. Memory beside the points is O(chunk x k). Once most points stay where they are, the sums of the clusters
change by the points that moved only. On a CPU the result depends on the points and the seed, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_slm.errors import SlmError
from mlx_slm.machine import runtime
from mlx_slm.machine.ranks import ranks

SUMMED_POINTS = 8192
"""Points that are added up at once in fp32; the sums of those are added in float64."""
SEEDING_POINTS = 64
"""k-means++ looks at this many points per centroid."""


def chunk_scores() -> int:
    """Scores (points x centroids) that exist at once in a lane: on a CPU 4 MB, which stay in its cache."""
    return 1 << 24 if runtime.on_gpu() else 1 << 20


@dataclass(frozen=True)
class KMeansState:
    """Where a run of `kmeans` stands: enough to go on from there to the same result, bit for bit."""

    restart: int = 0
    iteration: int = 0
    inertia: float = math.inf
    """Sum of squared distances to the nearest centroid at the last assignment."""
    centroids: np.ndarray | None = None
    """fp32 [k, dims]"""
    sums: np.ndarray | None = None
    """float64 [k, dims]: the points of each cluster, added up"""
    assignments: np.ndarray | None = None
    """int32 [points]"""
    best_inertia: float = math.inf
    best_centroids: np.ndarray | None = None


@dataclass(frozen=True)
class Lloyd:
    """How Lloyd's algorithm runs."""

    seed: int = 0
    iterations: int = 50
    """At most."""
    tolerance: float = 1e-4
    """Stop when the inertia falls by less than this part of itself."""
    restarts: int = 1
    """Runs from other seeds, of which the best counts."""


def kmeans(
    points: np.ndarray,
    k: int,
    lloyd: Lloyd = Lloyd(),
    state: KMeansState | None = None,
    on_iteration: Callable[[KMeansState], None] = lambda state: None,
) -> tuple[np.ndarray, float]:
    """Cluster points fp32 [n, dims]; returns (centroids fp32 [k, dims], inertia), the best of all runs.

    `on_iteration` gets the state after each iteration; given back as `state`, the run goes on from there. Raises
    SlmError for k > n or a point that is not finite.
    """
    if k > len(points):
        raise SlmError(f"k = {k:,} clusters of {len(points):,} windows: the largest possible k is {len(points):,}")
    squares = np.einsum("nd,nd->n", points, points)
    require_finite(squares, "point")
    rows, squares = mx.array(points), float(squares.sum(dtype=np.float64))
    state = state or KMeansState()
    while state.restart < lloyd.restarts:
        if state.centroids is None:
            rng = np.random.default_rng((lloyd.seed, state.restart))
            state = replace(state, centroids=_of_first(seed_centroids(points, k, rng)))
        state = _lloyd(rows, squares, state, lloyd.iterations, lloyd.tolerance, on_iteration)
        if state.inertia < state.best_inertia:
            state = replace(state, best_inertia=state.inertia, best_centroids=state.centroids)
        following = KMeansState(restart=state.restart + 1)
        state = replace(following, best_inertia=state.best_inertia, best_centroids=state.best_centroids)
    assert state.best_centroids is not None
    return state.best_centroids, state.best_inertia


def _lloyd(
    points: mx.array, squares: float, state: KMeansState, iterations: int, tolerance: float, on_iteration
) -> KMeansState:
    while True:
        assert state.centroids is not None
        assignments = _nearest_of_all(points, state.centroids)
        k = len(state.centroids)
        sums = _moved_sums(points, assignments, k, state)
        counts = np.bincount(assignments, minlength=k)
        inertia = ranks().from_first(_inertia(squares, sums, counts, state.centroids))
        converged = state.iteration > 0 and state.inertia - inertia <= tolerance * inertia
        if converged or state.iteration >= iterations:
            return replace(state, inertia=inertia)
        centroids = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        reseed_empty(centroids, counts, points, assignments)
        centroids = _of_first(centroids)
        state = replace(
            state,
            iteration=state.iteration + 1,
            inertia=inertia,
            centroids=centroids,
            sums=sums,
            assignments=assignments,
        )
        on_iteration(state)


def _inertia(squares: float, sums: np.ndarray, counts: np.ndarray, centroids: np.ndarray) -> float:
    """sum |x - c|^2 = sum |x|^2 - 2 sum_c (sum of its points).c + sum_c n_c |c|^2, without a pass over the points."""
    wide = centroids.astype(np.float64)
    return max(0.0, squares - 2 * float((sums * wide).sum()) + float(counts @ (wide**2).sum(axis=1)))


def _moved_sums(points: mx.array, assignments: np.ndarray, k: int, state: KMeansState) -> np.ndarray:
    """The points of each cluster added up, float64 [k, dims]; of what moved only the change, if that is less."""
    if state.assignments is None or state.sums is None:
        return _sums(points, assignments, k)
    moved = np.flatnonzero(assignments != state.assignments)
    if 2 * len(moved) >= len(assignments):
        return _sums(points, assignments, k)
    return state.sums + _sums(points, assignments, k, moved, state.assignments)


def _sums(
    points: mx.array, assignments: np.ndarray, k: int, moved: np.ndarray | None = None, before: np.ndarray | None = None
) -> np.ndarray:
    """Points added up per cluster, float64 [k, dims]; of `moved` ones the change from where they were `before`."""
    count = len(assignments) if moved is None else len(moved)

    def part(lane: int, where: slice) -> mx.array:
        zeros = mx.zeros((k, points.shape[1]))
        if moved is None or before is None:
            return zeros.at[mx.array(assignments[where])].add(points[where])
        chosen = moved[where]
        rows = points[mx.array(chosen)]
        gained = zeros.at[mx.array(assignments[chosen])].add(rows)
        return gained - zeros.at[mx.array(before[chosen])].add(rows)

    size = max(1, min(SUMMED_POINTS, -(-count // len(runtime.lanes()))))
    total = np.zeros((k, points.shape[1]))
    chunks = (slice(start, min(start + size, count)) for start in range(0, count, size))
    for _, sums in runtime.in_lanes(chunks, part):
        total += np.array(sums)
    return total


def scorer(centroids: np.ndarray) -> Callable[[mx.array], mx.array]:
    """From points fp32 [n, dims] to x.c - |c|^2 / 2, fp32 [n, k]: the largest is that of the nearest centroid."""
    turned, bias = mx.array(centroids.T), mx.array(-0.5 * (centroids**2).sum(axis=1))
    return lambda points: mx.addmm(bias, points, turned)


def nearest(points: mx.array, centroids: np.ndarray, with_scores: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return (assignments int32 [n], scores fp32 [n]: x.c - |c|^2 / 2 of the nearest; none of them unless asked)."""
    scores_of = scorer(centroids)
    size = max(1, chunk_scores() // len(centroids))
    assignments = np.empty(len(points), np.int32)
    scores = np.empty(len(points) if with_scores else 0, np.float32)

    def best(lane: int, where: slice) -> tuple[mx.array, ...]:
        closeness = scores_of(points[where])
        place = mx.argmax(closeness, axis=-1)
        return (place, mx.take_along_axis(closeness, place[:, None], axis=-1)[:, 0]) if with_scores else (place,)

    chunks = (slice(start, min(start + size, len(points))) for start in range(0, len(points), size))
    for where, (place, *score) in runtime.in_lanes(chunks, best):
        assignments[where] = place
        if with_scores:
            scores[where] = score[0]
    return assignments, scores


def _of_first(centroids: np.ndarray) -> np.ndarray:
    """Those of the first rank: sums on a GPU, and embeddings made on two machines, may differ in their last bits."""
    if ranks().size == 1:
        return centroids
    return np.array(ranks().tree_from_first({"centroids": mx.array(centroids)})["centroids"])


def _nearest_of_all(points: mx.array, centroids: np.ndarray) -> np.ndarray:
    """The nearest centroid of each point, int32 [n]. Of several ranks each looks at its part of the chunks, and they
    gather 4 bytes a point: the chunks are those of one rank, and so are the bits."""
    together, size, count = ranks(), max(1, chunk_scores() // len(centroids)), len(points)
    if together.size == 1:
        return nearest(points, centroids, with_scores=False)[0]
    starts = list(range(0, count, size))
    rounds = -(-len(starts) // together.size)
    own = np.zeros((rounds, size), np.int32)
    for turn, start in enumerate(together.own(starts)):
        chunk = points[start : start + size]
        own[turn, : len(chunk)] = nearest(chunk, centroids, with_scores=False)[0]
    every = together.values_of_all(own)
    return every.swapaxes(0, 1).reshape(-1)[:count]


def reseed_empty(centroids: np.ndarray, counts: np.ndarray, points: mx.array, assignments: np.ndarray) -> None:
    """Put the centroid of each empty cluster onto the farthest point of the largest cluster, in place.

    The next assignment moves that point, and with it the sums.
    """
    counts, assignments = counts.copy(), assignments.copy()
    for empty in np.flatnonzero(counts == 0):
        largest = int(counts.argmax())
        if counts[largest] < 2:
            return
        members = np.flatnonzero(assignments == largest)
        own = np.array(points[mx.array(members)])
        distances = np.square(own - centroids[largest]).sum(axis=1)
        farthest = members[int(distances.argmax())]
        centroids[empty] = np.array(points[int(farthest)])
        assignments[farthest] = empty
        counts[largest] -= 1
        counts[empty] = 1


def seed_centroids(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Greedy k-means++ (Arthur and Vassilvitskii, 2007): each centroid is the best of 2 + ln k points drawn with
    probability proportional to the squared distance to the centroids so far. Returns fp32 [k, dims]."""
    count = min(len(points), max(SEEDING_POINTS * k, 4096))
    chosen = points if count == len(points) else points[np.sort(rng.permutation(len(points))[:count])]
    trials = 2 + int(math.log(k))
    squares = np.einsum("nd,nd->n", chosen, chosen)
    rows = mx.array(chosen)
    first = int(rng.integers(count))
    centroids = [first]
    closest = _distances(rows, squares, np.array([first]))[:, 0]
    while len(centroids) < k:
        cumulative = np.cumsum(closest, dtype=np.float64)
        if cumulative[-1] <= 0:  # fewer distinct points than clusters: the rest will be empty
            centroids.append(int(rng.integers(count)))
            continue
        candidates = np.minimum(np.searchsorted(cumulative, rng.random(trials) * cumulative[-1]), count - 1)
        distances = np.minimum(_distances(rows, squares, candidates), closest[:, None])
        best = int(distances.sum(axis=0, dtype=np.float64).argmin())
        centroids.append(int(candidates[best]))
        closest = np.ascontiguousarray(distances[:, best])
    return chosen[centroids].astype(np.float32)


def _distances(rows: mx.array, squares: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Squared distances fp32 [n, chosen]; exactly 0 from a point to itself."""
    products = np.array(rows @ rows[mx.array(chosen)].T)
    distances = np.maximum(squares[:, None] - 2 * products + squares[chosen], 0)
    distances[chosen, np.arange(len(chosen))] = 0
    return distances


def require_finite(squares: np.ndarray, what: str) -> None:
    """Raise SlmError naming the first point whose squared length [n] is not finite."""
    bad = np.flatnonzero(~np.isfinite(squares))
    if len(bad):
        raise SlmError(f"{what} {bad[0]:,} has an embedding that is not finite ({len(bad):,} such in all)")

"""k-means against scikit-learn and faiss on real embeddings, and its own promises."""

import os
from pathlib import Path

import numpy as np
import pytest

from mlx_slm.clustering import kmeans as module
from mlx_slm.clustering.kmeans import KMeansState, Lloyd, kmeans
from mlx_slm.clustering.tree import assign
from mlx_slm.errors import SlmError

CACHE = Path(os.environ.get("MLX_SLM_EMBEDDINGS", Path.home() / ".cache" / "mlx-slm" / "embeddings-50000.npy"))
"""Embeddings of short real texts, written by `python -m benchmarks kmeans`."""


@pytest.fixture(scope="module")
def embeddings(sentence_encoder, sentences):
    """20,000 real embeddings where they are cached, else 2,000 made here."""
    if CACHE.exists():
        return np.load(CACHE)[:20_000].astype(np.float32)
    return sentence_encoder.encode(sentences[:2000])


@pytest.fixture(scope="module")
def blobs():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((12, 16)).astype(np.float32) * 3
    return (centres[rng.integers(0, 12, 900)] + rng.standard_normal((900, 16))).astype(np.float32)


def inertia_of(points, centroids):
    return float(sum(distances.sum(dtype=np.float64) for _, distances in assign(iter([points]), [centroids])))


@pytest.mark.parametrize("k", [64, 256])
def test_inertia_equals_scikit_learns_and_faiss(embeddings, k):
    cluster = pytest.importorskip("sklearn.cluster", reason="needs scikit-learn (extra: peers)")
    faiss = pytest.importorskip("faiss", reason="needs faiss (extra: peers)")
    ours, _ = kmeans(embeddings, k, lloyd=Lloyd(seed=0))
    theirs = cluster.KMeans(k, init="k-means++", n_init=1, random_state=0).fit(embeddings)
    start = cluster.kmeans_plusplus(embeddings, k, random_state=0)[0].astype(np.float32)
    other = faiss.Kmeans(embeddings.shape[1], k, niter=25, max_points_per_centroid=len(embeddings))
    other.train(embeddings, init_centroids=start)
    found = inertia_of(embeddings, ours)
    assert found < 1.01 * theirs.inertia_
    assert found < 1.01 * inertia_of(embeddings, other.centroids)


def test_lloyd_from_the_same_start_ends_where_scikit_learn_does(blobs):
    cluster = pytest.importorskip("sklearn.cluster", reason="needs scikit-learn (extra: peers)")
    start = blobs[:12].copy()
    ours, inertia = kmeans(blobs, 12, lloyd=Lloyd(iterations=200, tolerance=0.0), state=KMeansState(centroids=start))
    theirs = cluster.KMeans(12, init=start, n_init=1, max_iter=200, tol=0).fit(blobs)
    np.testing.assert_allclose(ours, theirs.cluster_centers_, atol=1e-4)
    assert inertia == pytest.approx(theirs.inertia_, rel=1e-5)


def test_assignments_are_the_nearest_centroids(blobs, monkeypatch):
    monkeypatch.setattr(module, "chunk_scores", lambda: 700)
    centroids, inertia = kmeans(blobs, 7, lloyd=Lloyd(seed=3))
    (places, distances), *others = assign(iter([blobs[:500], blobs[500:]]), [centroids])
    exact = ((blobs[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2)
    assert (np.concatenate([places, others[0][0]]) == exact.argmin(axis=1)).all()
    np.testing.assert_allclose(distances, exact[:500].min(axis=1), rtol=1e-4, atol=1e-3)
    assert inertia == pytest.approx(exact.min(axis=1).sum(), rel=1e-4)


def test_the_same_for_a_seed_and_each_iteration_is_better(blobs):
    seen = []
    first, _ = kmeans(
        blobs, 30, lloyd=Lloyd(seed=4, tolerance=0.0), on_iteration=lambda state: seen.append(state.inertia)
    )
    again, _ = kmeans(blobs, 30, lloyd=Lloyd(seed=4, tolerance=0.0))
    assert (first == again).all() and seen == sorted(seen, reverse=True) and len(seen) > 3
    assert (kmeans(blobs, 30, lloyd=Lloyd(seed=5))[0] != first).any()
    assert kmeans(blobs, 9, lloyd=Lloyd(seed=5, restarts=4))[1] <= kmeans(blobs, 9, lloyd=Lloyd(seed=5))[1]


def test_sums_of_moved_points_are_those_of_all(blobs):
    states = []
    kmeans(blobs, 30, lloyd=Lloyd(seed=4, tolerance=0.0), on_iteration=states.append)
    for state in states:
        sums = np.stack([blobs[state.assignments == c].astype(np.float64).sum(axis=0) for c in range(30)])
        assert len(states) > 4
        np.testing.assert_allclose(state.sums, sums, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("stopped_after", [1, 4])
def test_stopped_and_resumed_ends_the_same_bit_for_bit(blobs, stopped_after):
    whole = kmeans(blobs, 20, lloyd=Lloyd(seed=1, restarts=2))
    states = []

    class Stop(Exception):
        pass

    def stop(state):
        states.append(state)
        if len(states) == stopped_after:
            raise Stop

    with pytest.raises(Stop):
        kmeans(blobs, 20, lloyd=Lloyd(seed=1, restarts=2), on_iteration=stop)
    resumed = kmeans(blobs, 20, lloyd=Lloyd(seed=1, restarts=2), state=states[-1])
    assert (resumed[0] == whole[0]).all() and resumed[1] == whole[1]


def test_more_clusters_than_points_is_refused(blobs):
    with pytest.raises(SlmError, match=r"k = 901 clusters of 900 windows: the largest possible k is 900"):
        kmeans(blobs, 901)
    centroids, inertia = kmeans(blobs[:40], 40, lloyd=Lloyd(seed=0))
    assert inertia == pytest.approx(0, abs=1e-2) and len(np.unique(centroids, axis=0)) == 40


def test_an_empty_cluster_gets_the_farthest_point_of_the_largest(blobs):
    far = np.full((1, 16), 50, np.float32)
    points = np.concatenate([blobs, far])
    start = np.stack([blobs.mean(axis=0), blobs[0], np.full(16, -999, np.float32)])
    states = []
    kmeans(points, 3, lloyd=Lloyd(iterations=1), state=KMeansState(centroids=start), on_iteration=states.append)
    assert (states[0].centroids[2] == far).all()


def test_after_an_empty_cluster_the_centroids_are_still_means(blobs):
    start = np.concatenate([blobs[:28], np.full((2, 16), 900, np.float32)])
    states = []
    centroids, inertia = kmeans(
        blobs, 30, lloyd=Lloyd(tolerance=0.0), state=KMeansState(centroids=start), on_iteration=states.append
    )
    assert len(states) > 3 and (np.bincount(states[0].assignments, minlength=30) == 0).sum() == 2
    for state in states[1:]:
        sums = np.stack([blobs[state.assignments == c].astype(np.float64).sum(axis=0) for c in range(30)])
        np.testing.assert_allclose(state.sums, sums, rtol=1e-4, atol=1e-3)
    assert inertia == pytest.approx(inertia_of(blobs, centroids), rel=1e-5)


def test_stopped_by_the_limit_the_inertia_is_of_what_is_returned(blobs):
    states = []
    centroids, inertia = kmeans(blobs, 30, lloyd=Lloyd(seed=1, iterations=3, tolerance=0.0), on_iteration=states.append)
    assert len(states) == 3 and inertia == pytest.approx(inertia_of(blobs, centroids), rel=1e-5)
    again = kmeans(blobs, 30, lloyd=Lloyd(seed=1, iterations=3, tolerance=0.0), state=states[-1])
    assert (again[0] == centroids).all() and again[1] == inertia, "resumed at the limit"


def test_fewer_distinct_points_than_clusters_leaves_clusters_empty():
    points = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    centroids, inertia = kmeans(points, 6, lloyd=Lloyd(seed=0))
    assert inertia == pytest.approx(0, abs=1e-5) and np.isfinite(centroids).all()


def test_a_point_that_is_not_finite_is_named(blobs):
    bad = blobs.copy()
    bad[17, 3] = np.nan
    with pytest.raises(SlmError, match="point 17 has an embedding that is not finite"):
        kmeans(bad, 4)

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_slm.text.rows import Phase, Sampler, SoupSampler, Stream, permuted


def streams_of(store, count, windows=None):
    clusters = np.random.default_rng(0).integers(0, count, windows or store.num_windows)
    return [Stream.of(store, np.flatnonzero(clusters == c)) for c in range(count)]


def expected_stream(store, windows):
    """The definition, written out: windows in order, a separator after each that does not end in `</s>`."""
    tokens, stored = [], []
    for index in windows:
        ids = store.window_tokens(index).tolist()
        tokens += ids
        stored += [True] * len(ids)
        if ids[-1] != store.eos_id:
            tokens.append(store.eos_id)
            stored.append(False)
    return tokens, stored


@pytest.mark.parametrize("subset", [None, "some", "one", "two"])
def test_every_token_is_a_target_exactly_once_per_pass(store, subset):
    rng = np.random.default_rng(0)
    chosen = {
        None: None,
        "some": rng.permutation(store.num_windows)[:57],
        "one": np.array([int(np.argmin(store.windows[:]["length"]))]),
        "two": np.array([5, 4]),
    }[subset]
    stream = Stream(store) if chosen is None else Stream.of(store, chosen)
    tokens, stored = expected_stream(store, range(store.num_windows) if chosen is None else chosen)
    assert stream.length == len(tokens)
    length, seen = store.context_length, np.zeros(len(tokens), int)
    for row in range(stream.num_rows):
        found, weights = stream.row(row)
        places = (row * length + np.arange(length + 1)) % len(tokens)
        assert found.tolist() == [tokens[i] for i in places]
        np.add.at(seen, places[1:], weights.astype(int))
    assert seen.tolist() == [int(s) for s in stored]


def test_a_pass_takes_each_row_once_and_passes_differ(store):
    stream = Stream(store)
    sampler = Sampler([stream], np.ones(1), 4, seed=3)
    rows = [tuple(row) for step in range(stream.num_rows // 4 + 1) for row in sampler.rows(step)[0]]
    every = sorted(tuple(stream.row(i)[0]) for i in range(stream.num_rows))
    assert sorted(rows[: stream.num_rows]) == every
    orders = [[permuted(i, stream.num_rows, key) for i in range(stream.num_rows)] for key in (1, 2)]
    assert orders[0] != orders[1]


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size, key):
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permutation_moves_things():
    found = [permuted(i, 1000, 99) for i in range(1000)]
    assert abs(np.corrcoef(found, range(1000))[0, 1]) < 0.15


@pytest.mark.parametrize("count", [1, 5])
def test_rows_depend_on_seed_and_step_only(store, count):
    def sampler(seed=7):
        return Sampler(streams_of(store, count), np.arange(1, count + 1), 8, seed, rows_per_cluster=2)

    forward = [sampler.rows(step) for sampler in [sampler()] for step in range(9)]
    for step in (8, 3, 5):
        for found, expected in zip(sampler().rows(step), forward[step], strict=True):
            assert (found == expected).all()
    jumping = sampler()
    assert all((jumping.rows(step)[0] == forward[step][0]).all() for step in (4, 2, 8))
    assert (sampler(8).rows(3)[0] != forward[3][0]).any()


def test_counts_of_each_step_are_the_expectation_rounded(store):
    weights = np.array([0.5, 0.3, 0.11, 0.06, 0.03])
    sampler = Sampler(streams_of(store, 5), weights, 16, seed=0)
    counts = np.array([np.bincount(sampler.clusters(step), minlength=5) for step in range(2000)])
    assert (counts >= np.floor(16 * weights)).all() and (counts <= np.ceil(16 * weights)).all()
    assert np.abs(counts.mean(axis=0) - 16 * weights).max() < 0.05


def test_a_phase_has_its_own_distribution_and_goes_on_with_the_passes(store):
    """Steps 0 to 9 from clusters 0 and 1, 10 to 19 from 1 and 2, then from 2 alone."""
    first, second, last = np.array([3, 1, 0]), np.array([0, 1, 1]), np.array([0, 0, 1])

    def sampler():
        later = (Phase(20, last), Phase(10, second))
        return Sampler(streams_of(store, 3), first, 8, seed=4, later=later)

    counts = [np.bincount(sampler().clusters(step), minlength=3).tolist() for step in (0, 9, 10, 19, 20, 500)]
    assert counts == [[6, 2, 0]] * 2 + [[0, 4, 4]] * 2 + [[0, 0, 8]] * 2
    forward = [one.rows(step) for one in [sampler()] for step in range(25)]
    for step in (24, 9, 12):
        assert all((found == wanted).all() for found, wanted in zip(sampler().rows(step), forward[step], strict=True))
    of_cluster_1 = [tuple(row) for rows, _, c in forward[:20] for row, at in zip(rows, c, strict=True) if at == 1]
    size = streams_of(store, 3)[1].num_rows
    assert len(of_cluster_1) == 60 and len(set(of_cluster_1[:size])) == min(size, 60), "a pass goes on over phases"


def test_rows_of_a_soup_are_of_its_histograms_and_on_the_whole_of_the_distribution(store):
    """Of 4 groups of 3 rows half are mixed. Given the first row's cluster c, its share is (2 + 7 p_c) / 9."""
    masses = np.array([0.4, 0.3, 0.2, 0.1])

    def sampler():
        return SoupSampler(streams_of(store, 4), masses, 12, 5, 3, soup=0.5)

    steps = 3000
    of = sampler()
    soups, rows = [of.experts(step) for step in range(steps)], [of.row_clusters(step) for step in range(steps)]
    shares, clusters = np.stack([one.shares for one in soups]), np.stack([one.clusters for one in soups])
    rows = np.stack(rows).reshape(steps, 4, 3)
    np.testing.assert_allclose(shares.sum(axis=2), 1, rtol=1e-6)
    mixed = shares[:, :, 0] < 1
    assert (mixed.sum(axis=1) == 2).all()
    assert (rows[~mixed] == rows[~mixed][:, :1]).all(), "a group of one expert has rows of its cluster alone"
    assert ((rows[mixed][:, :, None] == clusters[mixed][:, None, :]).any(axis=2)).all()
    counts = np.bincount(rows.reshape(-1), minlength=4) / rows.size
    independent = steps * 4
    assert np.abs(counts - masses).max() < 5 * np.sqrt(0.25 / independent), "the groups are, not their rows"
    first, second = rows[mixed][:, 0], rows[mixed][:, 1]
    for cluster in range(4):
        expected = (2 + 7 * masses[cluster]) / 9
        again = (second[first == cluster] == cluster).mean()
        assert abs(again - expected) < 5 * np.sqrt(0.25 / (first == cluster).sum())
    forward = [one.rows(step)[0] for one in [sampler()] for step in range(9)]
    assert all((sampler().rows(step)[0] == forward[step]).all() for step in (8, 3))


@pytest.mark.parametrize("later", [(), (1, 2, 3, 4)])
def test_no_row_repeats_within_a_pass_of_a_cluster(store, later):
    streams = streams_of(store, 4, windows=120)
    phases = (Phase(17, np.array(later)),) if later else ()
    sampler = Sampler(streams, np.array([4, 3, 2, 1]), 8, seed=1, later=phases)
    drawn = {c: [] for c in range(4)}
    for step in range(60):
        tokens, _, clusters = sampler.rows(step)
        for row, cluster in zip(tokens, clusters, strict=True):
            drawn[cluster].append(tuple(row))
    for cluster, rows in drawn.items():
        size = streams[cluster].num_rows
        assert len(rows) > size, "the test must cross a pass"
        assert len(set(rows[:size])) == size


def test_batch_must_hold_whole_groups(store):
    with pytest.raises(ValueError, match="not a multiple of rows_per_cluster"):
        Sampler([Stream(store)], np.ones(1), 6, 0, rows_per_cluster=4)

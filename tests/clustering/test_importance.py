"""Importance sampling: the distribution, its report, and the identities of section 2.4."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_slm.clustering.importance import (
    Adjustment,
    capped,
    histogram,
    importance,
    kl,
    read_weights,
    smoothed,
)
from mlx_slm.errors import SlmError
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.text.rows import Sampler, Stream
from mlx_slm.training.scoring import Scorer

GENERIC = np.array([500.0, 300.0, 150.0, 40.0, 10.0])
DOMAIN = np.array([10.0, 0.0, 60.0, 30.0, 0.0])
ROWS = np.array([50, 30, 15, 4, 1])


def test_histograms_count_tokens():
    assert histogram(np.array([2, 0, 2]), np.array([5, 7, 1]), 4).tolist() == [7, 0, 6, 0]


def test_smoothing_is_the_formula_and_without_it_the_papers():
    generic = GENERIC / GENERIC.sum()
    found = smoothed(DOMAIN, generic, 50.0)
    assert found == pytest.approx((DOMAIN + 50 * generic) / 150) and found.sum() == pytest.approx(1)
    assert smoothed(DOMAIN, generic, 0.0).tolist() == (DOMAIN / 100).tolist()
    with pytest.raises(SlmError, match="no tokens to make a histogram of"):
        smoothed(np.zeros(5), generic, 0.0)


def test_the_report():
    found = importance(DOMAIN, GENERIC, ROWS, wanted_rows=40, names={"domain": "notes"})
    q, g = DOMAIN / 100, GENERIC / 1000
    assert found.distribution == pytest.approx(q)
    facts = found.facts
    assert facts["passes_max"] == pytest.approx(40 * 0.3 / 4) and facts["passes_max_cluster"] == 3
    assert facts["passes_mean"] == pytest.approx(sum(q * q * 40 / ROWS))
    weights = q / g
    effective = sum(g * weights) ** 2 / sum(g * weights**2)
    assert facts["effective_fraction"] == pytest.approx(effective)
    assert facts["effective_tokens"] == int(effective * 1000)
    assert facts["exp_entropy"] == pytest.approx(
        math.exp(-(0.1 * math.log(0.1) + 0.6 * math.log(0.6) + 0.3 * math.log(0.3)))
    )
    assert facts["kl_generic"] == pytest.approx(kl(q, g)) and facts["kl_resampled"] == pytest.approx(0, abs=1e-12)
    assert facts["clusters_used"] == 3 and facts["moved"] == 0
    assert "passes, expected        max 3.00 (cluster 3)" in found.lines and "notes" in found.lines
    json.dumps(facts, allow_nan=False)


def test_a_generic_fraction_mixes_generic_rows_in():
    found = importance(DOMAIN, GENERIC, ROWS, wanted_rows=40, adjustment=Adjustment(generic_fraction=0.25)).distribution
    assert found == pytest.approx(0.75 * DOMAIN / 100 + 0.25 * GENERIC / 1000)


def test_max_passes_moves_mass_to_the_generic_distribution_and_says_so():
    found = importance(DOMAIN, GENERIC, ROWS, wanted_rows=40, adjustment=Adjustment(max_passes=1.2))
    passes = found.distribution * 40 / ROWS
    assert passes.max() == pytest.approx(1.2) and passes[3] == pytest.approx(1.2)
    assert found.distribution.sum() == pytest.approx(1)
    moved = found.distribution - DOMAIN / 100
    free = [0, 1, 4]
    assert moved[free] / moved[free].sum() == pytest.approx(GENERIC[free] / GENERIC[free].sum())
    assert found.facts["moved"] == pytest.approx(moved[moved > 0].sum()) and "moved" in found.lines


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 1), st.floats(0.01, 1)), min_size=2, max_size=12))
def test_a_capped_distribution_keeps_its_limits(rows):
    target, generic, limits = (np.array(column) for column in zip(*rows, strict=True))
    target, generic = (target + 1e-9) / (target + 1e-9).sum(), generic / generic.sum()
    limits = limits / limits.sum() * 1.3
    found = capped(target, generic, limits)
    assert found.sum() == pytest.approx(1) and (found <= limits + 1e-9).all() and (found >= -1e-12).all()
    assert (found >= np.minimum(target, limits) - 1e-9).all(), "only what is over a limit moves"


def test_a_request_that_cannot_be_met_says_what_can():
    with pytest.raises(SlmError) as caught:
        importance(DOMAIN, GENERIC, ROWS, wanted_rows=400, adjustment=Adjustment(max_passes=2))
    text = str(caught.value)
    assert "400 rows cannot be drawn in clusters.max_passes = 2" in text and "gives 200" in text
    assert "biggest gap is in cluster 2, which would need 240 rows and has 15" in text
    assert "at most 50 % of the tokens" in text and "raise clusters.max_passes to 4 or more" in text


@given(st.integers(1, 5000), st.integers(1, 5000))
@example(399, 175)
@example(4563, 1825)
def test_the_limit_that_is_advised_is_enough(wanted, have):
    rows = np.array([have])
    one = np.array([1.0])
    try:
        importance(one, one, rows, wanted_rows=wanted, adjustment=Adjustment(max_passes=0.001))
    except SlmError as error:
        advised = float(str(error).split("clusters.max_passes to ")[1].split()[0])
        assert importance(
            one, one, rows, wanted_rows=wanted, adjustment=Adjustment(max_passes=advised)
        ).distribution.tolist() == [1]


def test_mass_on_a_cluster_without_generic_windows_moves():
    generic, rows = GENERIC.copy(), ROWS.copy()
    generic[3] = rows[3] = 0
    found = importance(DOMAIN, generic, rows, 40)
    assert found.distribution[3] == 0 and found.distribution.sum() == pytest.approx(1)
    assert found.facts["kl_generic"] is None and found.facts["kl_resampled"] is None
    assert "infinite" in found.lines and found.facts["moved"] == pytest.approx(0.3)


def test_a_domain_in_one_cluster_draws_from_it_alone():
    found = importance(np.array([0, 0, 0, 7.0, 0]), GENERIC, ROWS, 40)
    assert found.distribution.tolist() == [0, 0, 0, 1, 0] and found.facts["exp_entropy"] == 1
    assert found.facts["effective_fraction"] == pytest.approx(0.04)


@pytest.mark.parametrize("text", ["[1, 0, 2.5]", '{"0": 1, "2": 2.5}', "0: 1\n2: 2.5\n"])
def test_weights_come_from_yaml_or_json(tmp_path, text):
    path = tmp_path / "w.yaml"
    path.write_text(text)
    assert read_weights(path, 3).tolist() == [1, 0, 2.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "expected a list of 3 numbers"),
        ("3", "expected a list of 3 numbers"),
        ("{7: 1}", "7: 1: expected a cluster from 0 to 2"),
        ("[1, -2, 0]", "1: -2: expected"),
        ("[1, .nan, 0]", "1: nan: expected"),
        ("[0, 0, 0]", "all weights are 0"),
        ("[1, ", "not valid YAML"),
    ],
)
def test_weights_that_make_no_sense_are_refused(tmp_path, text, message):
    path = tmp_path / "w.yaml"
    path.write_text(text)
    with pytest.raises(SlmError, match="w.yaml") as caught:
        read_weights(path, 3)
    assert message in str(caught.value)


def test_counts_of_many_rows_match_the_distribution(store):
    """Chi-square over 200,000 drawn rows; systematic sampling makes it far smaller than independent draws would."""
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 40, store.num_windows)
    streams = [Stream.of(store, np.flatnonzero(clusters == c)) for c in range(40)]
    wanted = rng.dirichlet(np.full(40, 0.3))
    sampler = Sampler(streams, wanted, 32, seed=1)
    counts = np.zeros(40)
    for step in range(200_000 // 32):
        drawn = np.bincount(sampler.clusters(step), minlength=40)
        assert (drawn >= np.floor(32 * wanted - 1e-9)).all() and (drawn <= np.ceil(32 * wanted + 1e-9)).all()
        counts += drawn
    expected = counts.sum() * wanted
    used = expected > 5
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    assert counts.sum() == 200_000 and statistic < 62.4, "chi-square, 39 degrees of freedom, p = 0.01"
    assert statistic < 39, "systematic sampling has less variance than multinomial draws"


def test_the_estimator_identity(store, config):
    """E_generic[w(x) loss(x)] = E_resampled[loss(x)]: section 2.4, on training rows with a real model's losses."""
    shape = Shape.of(config.model, 400, store.context_length)
    model = Transformer(shape)
    model.update(initialise(shape, 0))
    windows = np.arange(400)
    per_window = Scorer(model).window_nll(store, windows) / store.windows[:]["length"][windows]
    clusters = np.digitize(per_window, np.quantile(per_window, [0.3, 0.7, 0.9]))
    streams = [Stream.of(store, np.flatnonzero(clusters == c)) for c in range(4)]
    rows = [(c, *stream.row(i)) for c, stream in enumerate(streams) for i in range(stream.num_rows)]
    tokens, weights = (mx.array(np.stack(part)) for part in list(zip(*rows, strict=True))[1:])
    nll = nn.losses.cross_entropy(model.logits(tokens[:, :-1]), tokens[:, 1:])
    losses = np.array((nll * weights).sum(axis=1) / weights.sum(axis=1), np.float64)
    owner = np.array([c for c, *_ in rows])
    target = np.array([0.05, 0.15, 0.3, 0.5])
    w = (target / (np.bincount(owner, minlength=4) / len(rows)))[owner]
    assert w.mean() == pytest.approx(1)
    weighted, loss_of = (
        (w * losses).mean(),
        {row.tobytes(): loss for (_, row, _), loss in zip(rows, losses, strict=True)},
    )
    sampler = Sampler(streams, target, 16, seed=2)
    drawn = np.array([loss_of[row.tobytes()] for step in range(60) for row in sampler.rows(step)[0]])
    error = drawn.std() / math.sqrt(len(drawn))
    assert abs(weighted - drawn.mean()) < 2 * error
    assert abs(losses.mean() - drawn.mean()) > 4 * error, "without the weights it does not hold"

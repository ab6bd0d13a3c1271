import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_slm.config.schema import ModelConfig
from mlx_slm.errors import SlmError
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.text.store import Store
from mlx_slm.training.scoring import Score, Scorer, validation_windows


@pytest.fixture(scope="module")
def model(store):
    shape = Shape.of(ModelConfig(family="gpt2", num_layers=2, dims=32, num_heads=4), 400, store.context_length)
    made = Transformer(shape)
    made.update(initialise(shape, 3))
    return made


@pytest.fixture(scope="module")
def valid(prepared) -> Store:
    return Store(prepared.data("generic", "valid"))


def test_perplexity_does_not_depend_on_the_batch(model, valid):
    windows = np.arange(valid.num_windows)
    scores = [Scorer(model)(valid, windows, rows) for rows in (1, 3, 16, None)]
    for score in scores[1:]:
        assert abs(score.perplexity / scores[0].perplexity - 1) < 1e-6
        assert score.tokens == valid.num_tokens


def test_against_a_slow_loop_in_float64(model, valid):
    windows = np.array([3, 0, 11, 40, 41])
    total, per_document = 0.0, {}
    for index in windows:
        ids = valid.window_tokens(index).tolist()
        logits = np.array(model.logits(mx.array([[valid.eos_id, *ids[:-1]]]))[0], np.float64)
        nll = [math.log(np.exp(row - row.max()).sum()) + row.max() - row[t] for row, t in zip(logits, ids, strict=True)]
        total += sum(nll)
        document = int(valid.windows[int(index)]["document"])
        found = per_document.setdefault(document, [0.0, 0])
        found[0], found[1] = found[0] + sum(nll), found[1] + len(ids)
    score = Scorer(model)(valid, windows)
    count = sum(n for _, n in per_document.values())
    assert score.tokens == count and score.documents == len(per_document)
    assert abs(score.nll * count / total - 1) < 1e-6
    text_bytes = int(valid.windows[:]["bytes"][windows].sum())
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / text_bytes, rel=1e-6)
    mean = total / count
    spread = sum((s - mean * n) ** 2 for s, n in per_document.values()) * len(per_document) / (len(per_document) - 1)
    assert score.stderr == pytest.approx(math.sqrt(spread) / count, rel=1e-5)


def test_windows_are_scored_once_each_in_their_own_place(model, valid):
    scorer, every = Scorer(model), np.arange(valid.num_windows)
    nll = scorer.window_nll(valid, every)
    order = np.random.default_rng(0).permutation(every)
    assert np.allclose(scorer.window_nll(valid, order), nll[order], rtol=1e-6)
    assert (nll > 0).all()


def test_the_scorer_reads_the_present_weights(model, valid):
    scorer, windows = Scorer(model), np.arange(20)
    before = scorer(valid, windows).nll
    kept = model.parameters()
    model.update(initialise(model.shape, 4))
    assert scorer(valid, windows).nll != before
    model.update(kept)
    assert scorer(valid, windows).nll == before


def test_standard_error_shrinks_as_documents_grow():
    rng = np.random.default_rng(0)
    scores = [Score.of(rng.normal(50, 5, n), np.full(n, 10), np.arange(n), 100) for n in (100, 10_000)]
    assert scores[0].stderr == pytest.approx(0.5 / 10, rel=0.2)
    assert scores[1].stderr == pytest.approx(0.5 / 100, rel=0.05)


def test_validation_windows_are_the_same_each_time_and_enough(prepared, store, valid):
    chosen = validation_windows(valid, 500, 0)
    assert chosen.tolist() == validation_windows(valid, 500, 0).tolist()
    assert 500 <= valid.windows[:]["length"][chosen].sum() < 532
    assert len(validation_windows(valid, 10**9, 0)) == valid.num_windows


def test_a_validation_set_of_too_few_tokens_is_refused(prepared):
    short = Store(prepared.data("generic", "valid"))
    short.context_length, short.num_tokens = 1024, 256
    assert len(validation_windows(short, 100, 0))
    short.num_tokens = 255
    with pytest.raises(
        SlmError, match=r"validation set of generic has [\d,]+ tokens, at least \d+ are needed: .* valid=PATH"
    ):
        validation_windows(short, 100, 0)


def test_a_token_outside_of_the_vocabulary_never_reaches_the_model(valid):
    """There the look-up of an embedding reads foreign memory, and gives any number."""
    shape = Shape.of(ModelConfig(family="gpt2", num_layers=1, dims=32, num_heads=4), 300, valid.context_length)
    small = Transformer(shape)
    small.update(initialise(shape, 3))
    with pytest.raises(SlmError, match=r"holds the token 3\d\d, the model's vocabulary has 300"):
        Scorer(small)(valid, np.arange(valid.num_windows))

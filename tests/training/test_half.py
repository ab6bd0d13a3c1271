"""bf16, as a GPU computes, against fp32, on a CPU: gradients on real text, and what a training ends at."""

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.half import errors, gradients, head_error, rows_of, shape_of, trained, words_of_sources
from mlx_slm.machine import runtime
from mlx_slm.models.transformer import Transformer, for_products, initialise
from mlx_slm.training.loss import linear_cross_entropy, next_token_loss

pytestmark = pytest.mark.skipif(runtime.backend() != "cpu", reason="both forms are compared on one device")


@pytest.fixture(autouse=True)
def form(monkeypatch):
    """What the comparison leaves in the environment goes again."""
    monkeypatch.setenv("MLX_SLM_AS_GPU", "0")


@pytest.fixture(scope="module")
def words():
    return words_of_sources(20)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_after_forty_steps(family, words):
    shape = shape_of(family, 2, 64, 32)
    parameters, _ = trained(shape, words, 40, 64)
    tokens, weights = rows_of(words, 64, 32, 40)
    half, full = (gradients(shape, parameters, tokens, weights, half) for half in (True, False))
    found = errors(half, full, tokens)
    assert found["whole"] < 0.05 and found["row"] < 0.05 and found["worst"] < 0.15, found
    assert head_error(shape, parameters, tokens) < 2.0**-8


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_row_of_the_most_frequent_token_before_training(family, words):
    """Within two roundings; summed one add at a time in bf16 it is 0.8 % off."""
    shape = shape_of(family, 2, 64, 32)
    tokens, weights = rows_of(words, 64, 32, 0)
    half, full = (gradients(shape, initialise(shape, 0), tokens, weights, half) for half in (True, False))
    assert errors(half, full, tokens)["row"] < 2.0**-8


def test_the_gradient_of_a_head_that_is_sure(monkeypatch):
    """p is 0.97: rounded before 1 is subtracted, what is left would be off by 2^-9 / 0.03. Logits below 8 are off by
    2^-9 * 8 at most, and so is log p."""
    head = 2.6 * np.linalg.qr(np.random.default_rng(0).standard_normal((32, 32)))[0]
    head = mx.array(head.astype(np.float32)).astype(mx.bfloat16).astype(mx.float32)
    targets = mx.array(np.arange(320) % 32)
    gradient = mx.grad(lambda head, hidden: linear_cross_entropy(hidden, head, targets, mx.ones(320)))
    full = np.array(gradient(head, head[targets]), np.float64)
    monkeypatch.setenv("MLX_SLM_AS_GPU", "1")
    half = np.array(gradient(head, head[targets].astype(mx.bfloat16)), np.float64)
    assert np.linalg.norm(half - full) < 2.0**-5 * np.linalg.norm(full)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_summed_over_tokens_is_summed_in_fp32(family):
    """One token 4,096 times: a sum of bf16 numbers of one size stands still after 256 of them."""
    shape = shape_of(family, 1, 32, 64)
    tokens, weights = np.full((64, 65), 7, np.int32), np.ones((64, 64), np.float32)
    half, full = (gradients(shape, initialise(shape, 0), tokens, weights, half) for half in (True, False))
    for name in full:
        if full[name].ndim == 1 or "embed" in name or "wte" in name or "wpe" in name:
            size = np.linalg.norm(full[name])
            assert np.linalg.norm(half[name] - full[name]) < 0.03 * size + 1e-3, name


def test_only_products_are_in_the_dtype():
    for family in ("gpt2", "llama"):
        shape = shape_of(family, 1, 32, 16)
        model = Transformer(shape)
        model.update(for_products(initialise(shape, 0), mx.bfloat16))
        tokens = mx.zeros((2, 17), mx.int32)
        assert model(tokens[:, :-1]).dtype == model.logits(tokens[:, :-1]).dtype == mx.bfloat16
        assert next_token_loss(model, tokens, mx.ones((2, 16))).dtype == mx.float32
        assert model.head.dtype == mx.float32


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_300_steps_end_where_fp32_ends(family, words):
    shape = shape_of(family, 1, 32, 16)
    full, half = (trained(shape, words, 300, 8, half, 5e-4)[1] for half in (False, True))
    assert abs(half / full - 1) < 0.01 and full < 5.5, (half, full)

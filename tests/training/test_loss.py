import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_slm.machine import runtime
from mlx_slm.models import ops
from mlx_slm.training.loss import chunk_rows, linear_cross_entropy, token_nll


def make(n=100, d=24, v=333, seed=0):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(n, d)), rng.normal(size=(v, d))
    return tuple(
        map(
            mx.array,
            (hidden.astype(np.float32), head.astype(np.float32), rng.integers(0, v, n), rng.random(n, np.float32)),
        )
    )


def reference(hidden, head, targets, weights):
    return (nn.losses.cross_entropy(hidden @ head.T, targets) * weights).sum()


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 33, 100, 1000])
def test_value_and_both_gradients(rows, vectorised, monkeypatch):
    monkeypatch.setattr(ops, "scalar_exp", lambda: vectorised)
    hidden, head, targets, weights = make()
    ours = mx.value_and_grad(lambda h, w: 3 * linear_cross_entropy(h, w, targets, weights, rows), (0, 1))(hidden, head)
    theirs = mx.value_and_grad(lambda h, w: 3 * reference(h, w, targets, weights), (0, 1))(hidden, head)
    assert abs(ours[0].item() / theirs[0].item() - 1) < 1e-5
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert mx.abs(a - b).max() < 1e-5 * mx.abs(b).max()


def test_value_against_float64():
    hidden, head, targets, weights = make(v=5000)
    logits = np.array(hidden, np.float64) @ np.array(head, np.float64).T
    top = logits.max(axis=1)
    nll = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - logits[np.arange(100), np.array(targets)]
    value = linear_cross_entropy(hidden, head, targets, weights, 16).item()
    assert abs(value / (nll * np.array(weights, np.float64)).sum() - 1) < 2e-6
    assert np.abs(np.array(token_nll(hidden, head, targets, 16)) - nll).max() < 1e-4


def test_a_position_of_weight_zero_has_no_part():
    hidden, head, targets, _ = make()
    weights = mx.array([1.0] * 60 + [0.0] * 40)
    gradient = mx.grad(lambda h: linear_cross_entropy(h, head, targets, weights, 32))(hidden)
    assert (gradient[60:] == 0).all() and (mx.abs(gradient[:60]).sum(axis=1) > 0).all()
    value, gradients = mx.value_and_grad(lambda h, w: linear_cross_entropy(h, w, targets, mx.zeros(100), 32), (0, 1))(
        hidden, head
    )
    assert value.item() == 0 and all((g == 0).all() for g in gradients)


def test_token_nll_is_the_plain_one_and_does_no_gradient_work(monkeypatch):
    hidden, head, targets, _ = make()
    assert mx.abs(token_nll(hidden, head, targets, 33) - nn.losses.cross_entropy(hidden @ head.T, targets)).max() < 1e-5
    hidden, head, targets, _ = make(n=512, d=64, v=4096)
    products = []
    real = mx.array.__matmul__
    monkeypatch.setattr(mx.array, "__matmul__", lambda a, b: products.append((a.shape, b.shape)) or real(a, b))
    token_nll(hidden, head, targets, 128)
    assert products == [((4096, 64), (64, 128))] * 4, "one product per chunk: the logits"


def test_chunks_halve_the_peak_memory():
    hidden, head, targets, weights = make(n=2048, d=64, v=8192)

    def peak(function):
        step = mx.compile(mx.value_and_grad(function, (0, 1)))
        mx.eval(step(hidden, head))
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(hidden, head))
        return mx.get_peak_memory() - before

    full = peak(lambda h, w: reference(h, w, targets, weights))
    chunked = peak(lambda h, w: linear_cross_entropy(h, w, targets, weights, 2048 // 16))
    assert full > 2 * 2048 * 8192 * 4
    assert chunked < full / 2


@pytest.mark.skipif(runtime.backend() != "cpu", reason="both forms are asked for")
def test_chunk_rows_are_even_and_bounded(monkeypatch):
    for as_gpu, least in (("0", 256), ("1", 2048)):
        monkeypatch.setenv("MLX_SLM_AS_GPU", as_gpu)
        assert chunk_rows(4096, 8192) == chunk_rows(4096, 2**18) == least and chunk_rows(4096, 1024) == 2048
        assert chunk_rows(least + 44, 2**18) == least // 2 + 22
        assert chunk_rows(10, 100) == 10


def test_half_precision_accumulates_in_fp32():
    hidden, head, targets, weights = make(n=64, d=32, v=3000)
    half = [x.astype(mx.bfloat16) for x in (hidden, head)]
    expected = reference(*(x.astype(mx.float32) for x in half), targets, weights).item()
    value, gradients = mx.value_and_grad(lambda h, w: linear_cross_entropy(h, w, targets, weights, 16), (0, 1))(*half)
    assert value.dtype == mx.float32 and abs(value.item() / expected - 1) < 5e-3
    assert [g.dtype for g in gradients] == [mx.bfloat16] * 2

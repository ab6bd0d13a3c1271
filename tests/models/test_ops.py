import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_slm.models import ops


@pytest.fixture(params=["vectorised", "own"], autouse=True)
def form(request, monkeypatch):
    """Both forms are tested on every machine: the one written out for Linux CPUs and MLX's own."""
    monkeypatch.setattr(ops, "scalar_exp", lambda: request.param == "vectorised")


def test_exp_against_float64():
    x = np.concatenate([-np.linspace(0, 23.9, 200_001), [-40, -1e30]]).astype(np.float32)
    found, expected = np.array(ops.exp_nonpositive(mx.array(x)), np.float64), np.exp(x.astype(np.float64))
    error = np.abs(found[:-2] / expected[:-2] - 1)
    assert error[x[:-2] > -10].max() < 5e-6 and error.max() < 2e-5
    assert np.abs(found - expected).max() < 2e-6
    assert (found[-2:] < 5e-11).all() and found[0] == 1
    assert np.isnan(np.array(ops.exp_nonpositive(mx.array([float("nan")]))))


def check_gradients(function, reference, arrays, tolerance=2e-6):
    key = mx.random.key(1)
    shape = reference(*arrays).shape
    weights = mx.random.normal(shape, key=key)
    numbers = tuple(range(len(arrays)))
    found, expected = (
        mx.value_and_grad(lambda *a, f=f: (f(*a) * weights).sum(), numbers)(*arrays) for f in (function, reference)
    )
    assert mx.abs(function(*arrays) - reference(*arrays)).max() < tolerance * mx.abs(reference(*arrays)).max()
    for a, b in zip(found[1], expected[1], strict=True):
        assert mx.abs(a - b).max() < tolerance * max(mx.abs(b).max().item(), 0.1)


def test_swiglu_and_gelu():
    gate, up = (5 * mx.random.normal((64, 33), key=mx.random.key(i)) for i in range(2))
    check_gradients(ops.swiglu, lambda g, u: nn.silu(g) * u, [gate, up])
    check_gradients(ops.gelu, nn.gelu_approx, [gate], 4e-6)


@pytest.mark.parametrize(("length", "heads"), [(1, 4), (37, 4), (128, 4), (300, 2), (601, 2)])
def test_attention_against_the_definition(length, heads):
    q = mx.random.normal((2, 4, length, 16), key=mx.random.key(0)) * 3
    k, v = (mx.random.normal((2, heads, length, 16), key=mx.random.key(i)) for i in (1, 2))

    def plain(q, k, v):
        k, v = (mx.repeat(x, 4 // heads, axis=1) for x in (k, v))
        scores = q @ k.swapaxes(-1, -2) * 0.25
        hidden = mx.arange(length)[:, None] < mx.arange(length)
        return mx.softmax(mx.where(hidden, -mx.inf, scores), axis=-1) @ v

    check_gradients(lambda q, k, v: ops.causal_attention(q, k, v, 0.25), plain, [q, k, v], 5e-6)


def test_attention_sees_no_future_bit():
    q, k, v = (mx.random.normal((1, 2, 200, 8), key=mx.random.key(i)) for i in range(3))
    later = mx.arange(200)[:, None] >= 150
    before = ops.causal_attention(q, k, v, 1.0)[:, :, :150]
    after = ops.causal_attention(q, mx.where(later, 30.0, k), mx.where(later, 1e6, v), 1.0)[:, :, :150]
    assert mx.array_equal(before, after)

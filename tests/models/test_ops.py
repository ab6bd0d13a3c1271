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


U = 2.0**-24
EXP = 5e-6
"""Relative error of an exp that is not negligible (test_exp_against_float64)."""


def attention_in_float64(q, k, v, d, scale):
    """((out, dq, dk, dv), bounds of the errors of fp32): what a sum of n terms loses is n u times their magnitudes.

    The scores are off by D u scale |q||k|, so probabilities by twice that and the error of exp.
    """
    length, width = q.shape[2:]
    visible = np.tri(length, dtype=bool)
    scores = np.where(visible, scale * q @ k.swapaxes(-1, -2), -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    out = p @ v
    ds = p * (d @ v.swapaxes(-1, -2) - (d * out).sum(axis=-1, keepdims=True))
    found = out, scale * ds @ k, scale * ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ d
    q, k, v, d = map(np.abs, (q, k, v, d))
    largest = scale * (q @ k.swapaxes(-1, -2) * visible).max()
    of_p = 2 * (EXP + (width + 2) * U * largest)
    of_sums = (2 * width + length + 10) * U
    ds = p * (d @ v.swapaxes(-1, -2) + (d * (p @ v)).sum(axis=-1, keepdims=True))
    sizes = p @ v, scale * ds @ k, scale * ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ d
    return found, [(2 * of_p + of_sums) * size for size in sizes]


@pytest.mark.parametrize(("length", "heads"), [(1, 4), (37, 4), (128, 4), (300, 2), (601, 2)])
def test_attention_against_the_definition(length, heads):
    rng = np.random.default_rng(length)
    q, d = (rng.normal(size=(2, 4, length, 16)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(2, heads, length, 16)).astype(np.float32) for _ in range(2))
    q *= 3
    arrays = [mx.array(x) for x in (q, k, v)]
    attend = lambda *x: ops.causal_attention(*x, 0.25)  # noqa: E731
    _, gradients = mx.value_and_grad(lambda *x: (attend(*x) * mx.array(d)).sum(), (0, 1, 2))(*arrays)
    q, k, v, d = (x.astype(np.float64) for x in (q, k, v, d))
    k, v = (np.repeat(x, 4 // heads, axis=1) for x in (k, v))
    expected, bounds = attention_in_float64(q, k, v, d, 0.25)
    joined = lambda x: x.reshape(2, heads, 4 // heads, length, 16).sum(axis=2)  # noqa: E731
    for place, (found, exact, bound) in enumerate(zip((attend(*arrays), *gradients), expected, bounds, strict=True)):
        if place > 1:
            exact, bound = joined(exact), joined(bound)
        assert (np.abs(np.array(found, np.float64) - exact) <= bound).all(), ("out", "dq", "dk", "dv")[place]
        assert bound.max() < 0.02 * max(1, np.abs(exact).max()), "the bound says something"


def test_attention_sees_no_future_bit():
    q, k, v = (mx.random.normal((1, 2, 200, 8), key=mx.random.key(i)) for i in range(3))
    later = mx.arange(200)[:, None] >= 150
    before = ops.causal_attention(q, k, v, 1.0)[:, :, :150]
    after = ops.causal_attention(q, mx.where(later, 30.0, k), mx.where(later, 1e6, v), 1.0)[:, :, :150]
    assert mx.array_equal(before, after)

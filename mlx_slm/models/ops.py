"""The element-wise functions and the attention that cost the time, in forms that fit the device.

On a Linux CPU, MLX computes exp one element at a time (13 ns), and softmax, SiLU and GELU are made of it. There the
same functions are written as products and sums that `mx.compile` turns into one vectorised loop (2.5 ns), each with its
own backward pass. On Metal, CUDA and macOS they are MLX's own.
"""

from __future__ import annotations

import functools
import sys

import mlx.core as mx
import mlx.nn as nn

from mlx_slm import runtime

FLOOR = 32.0
SQUARINGS = 5
COEFFICIENTS = (
    0.9999999995114079,
    0.9999999374035076,
    0.49999867939792075,
    0.16665600674653547,
    0.04162415464268321,
    0.008240356910079072,
    0.0012740899603045364,
    0.00012118171798647381,
)
"""exp on [-1, 0] to 1e-9: its Chebyshev interpolant of degree 7."""


@functools.cache
def scalar_exp() -> bool:
    """Whether this backend computes exp one element at a time."""
    return sys.platform == "linux" and runtime.backend() == "cpu"


def exp_nonpositive(x: mx.array) -> mx.array:
    """exp(x) for x <= 0 to 1e-5 relative (2e-6 above -10), e^-32 = 1.3e-14 below -32, NaN for NaN. No gradient.

    exp(x) = exp(x / 32)^32, the inner one by a polynomial: only products and sums, which g++ vectorises.
    """
    return _polynomial_exp(x) if scalar_exp() else mx.exp(x)


@mx.compile
def _polynomial_exp(x: mx.array) -> mx.array:
    r = mx.where(x < -FLOOR, -FLOOR, x) * (1 / FLOOR)
    p = COEFFICIENTS[-1]
    for c in COEFFICIENTS[-2::-1]:
        p = p * r + c
    for _ in range(SQUARINGS):
        p = p * p
    return p


def _sigmoid(x: mx.array) -> mx.array:
    e = _polynomial_exp(-mx.abs(x))
    return mx.where(x < 0, e, 1.0) / (1.0 + e)


@mx.custom_function
def _swiglu(gate: mx.array, up: mx.array):
    s = _sigmoid(gate)
    return gate * s * up, s


@_swiglu.vjp
def _swiglu_backward(primals, cotangents, outputs):
    (gate, up), d, s = primals, cotangents[0], outputs[1]
    silu = gate * s
    return d * up * (s + silu * (1.0 - s)), d * silu


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return _swiglu(gate, up)[0] if scalar_exp() else nn.silu(gate) * up


GELU_SCALE, GELU_CUBE = 1.5957691216057308, 0.044715  # 2 sqrt(2 / pi): tanh(u) = 2 sigmoid(2 u) - 1


@mx.custom_function
def _gelu(x: mx.array):
    s = _sigmoid(GELU_SCALE * (x + GELU_CUBE * x * x * x))
    return x * s, s


@_gelu.vjp
def _gelu_backward(primals, cotangents, outputs):
    x, d, s = primals, cotangents[0], outputs[1]
    return d * (s + x * s * (1.0 - s) * GELU_SCALE * (1.0 + 3 * GELU_CUBE * x * x))


def gelu(x: mx.array) -> mx.array:
    """GELU by tanh, as GPT-2 has it."""
    return _gelu(x)[0] if scalar_exp() else nn.gelu_approx(x)


def causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """softmax(q k^T * scale, causal) v for q [B, H, L, D] and k, v [B, H_kv, L, D]; returns [B, H, L, D]."""
    if not scalar_exp():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    if k.shape[1] != q.shape[1]:
        k, v = (mx.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    return _blocked_attention(q * scale, k, v)[0]


BLOCK = 128
"""Queries at a time; the keys after a block's end are never touched."""


def _blocks(length: int) -> list[slice]:
    return [slice(i, min(i + BLOCK, length)) for i in range(0, length, BLOCK)]


def _alone(x: mx.array) -> mx.array:
    """Keep an operation with a broadcast operand out of a fused loop, which would not be vectorised with it."""
    return mx.contiguous(x)


def exp_shifted(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return (exp(x - top), top), top the maximum over axis -2 (kept): there reductions are vectorised."""
    top = x.max(axis=-2, keepdims=True)
    return exp_nonpositive(_alone(x - top)), top


@mx.custom_function
def _blocked_attention(q: mx.array, k: mx.array, v: mx.array):
    """Scores are kept as keys x queries, so that softmax reduces over axis -2.

    Returns (out, probabilities of each block of queries...): the backward pass needs no exp.
    """
    out, kept = [], []
    for rows in _blocks(q.shape[2]):
        seen = slice(0, rows.stop)
        visible = _alone((mx.arange(rows.stop)[:, None] <= mx.arange(rows.start, rows.stop)).astype(q.dtype))
        scores = k[:, :, seen] @ q[:, :, rows].swapaxes(-1, -2)
        hidden = _alone((visible - 1) * 1e30)
        e, _ = exp_shifted(_alone(scores + hidden))
        e = _alone(e * visible)
        p = _alone(e / e.sum(axis=-2, keepdims=True))
        out.append(p.swapaxes(-1, -2) @ v[:, :, seen])
        kept.append(p)
    return mx.concatenate(out, axis=2), *kept


@_blocked_attention.vjp
def _blocked_attention_backward(primals, cotangents, outputs):
    q, k, v = primals
    d_out, out = cotangents[0], outputs[0]
    inner = (d_out * out).sum(axis=-1)[:, :, None]
    dq, dk, dv = [], None, None
    for rows, p in zip(_blocks(q.shape[2]), outputs[1:], strict=True):
        seen, pad = slice(0, rows.stop), [(0, 0), (0, 0), (0, q.shape[2] - rows.stop), (0, 0)]
        d = d_out[:, :, rows]
        ds = p * _alone(v[:, :, seen] @ d.swapaxes(-1, -2) - inner[..., rows])
        dq.append(ds.swapaxes(-1, -2) @ k[:, :, seen])
        part_k, part_v = mx.pad(ds @ q[:, :, rows], pad), mx.pad(p @ d, pad)
        dk, dv = (part_k, part_v) if dk is None else (dk + part_k, dv + part_v)
    return mx.concatenate(dq, axis=2), dk, dv


PHI_EDGE = 4.25
PHI = (
    0.3989353293,
    -0.06642762641,
    0.009877814333,
    -0.001129386916,
    9.715997948e-05,
    -6.009385304e-06,
    2.479441178e-07,
    -6.024924738e-09,
    6.460182985e-11,
)
"""(Phi(x) - 1/2) / x for |x| <= 4.25 as a polynomial in x^2: its Chebyshev interpolant of degree 8. With more than 9
coefficients `mx.compile` cuts the loop in two: 6.7 instead of 3.4 ns an element."""


@mx.compile
def _gelu_exact(x: mx.array) -> mx.array:
    """To 7e-5 of max(1, |x|)."""
    z = mx.where(x < -PHI_EDGE, -PHI_EDGE, mx.where(x > PHI_EDGE, PHI_EDGE, x))
    s = z * z
    p = PHI[-1]
    for c in PHI[-2::-1]:
        p = p * s + c
    return x * (0.5 + z * p)


def gelu_exact(x: mx.array) -> mx.array:
    """x * Phi(x), as BERT has it. No gradient."""
    return _gelu_exact(x) if scalar_exp() else nn.gelu(x)


def masked_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, hidden: mx.array) -> mx.array:
    """softmax(q k^T * scale + hidden) v, in both directions, for q, k, v [B, H, L, D]; no gradient.

    hidden: fp32 [B, L], 0 for keys that are seen and -1e9 for padding. Returns [B, H, L, D].
    """
    if not scalar_exp():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=hidden[:, None, None, :].astype(q.dtype))
    scores = _alone(k @ (q * scale).swapaxes(-1, -2)) + hidden[:, None, :, None]
    e, _ = exp_shifted(_alone(scores))
    out = e.swapaxes(-1, -2) @ v
    return out / e.sum(axis=-2)[..., None]

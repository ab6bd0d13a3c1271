"""The element-wise functions and the attention that cost the time, in forms that fit the device.

On a Linux CPU, MLX computes exp one element at a time (13 ns), and softmax, SiLU and GELU are made of it. There the
same functions are written as products and sums that `mx.compile` turns into one vectorised loop (2.5 ns), each with its
own backward pass. On Metal, CUDA and macOS they are MLX's own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slm.machine import runtime, sums

custom_function: Any = mx.custom_function
"""Its result is called as the function that it was made of, which MLX's types do not say."""
FLOOR = -24.0
SQUARINGS = 4
COEFFICIENTS = (
    0.9999999808695165,
    0.062499913001903995,
    0.0019530570780994982,
    4.0669232278976184e-05,
    6.325449561643251e-07,
    7.66651851247069e-09,
    6.87459646632968e-11,
    3.4373100072819774e-13,
)
"""exp(x / 16) on [-24, 0] to 2e-8 relative: the best polynomial of degree 7."""


def scalar_exp() -> bool:
    """Whether this backend computes exp one element at a time."""
    return sys.platform == "linux" and not runtime.on_gpu()


def exp_nonpositive(x: mx.array) -> mx.array:
    """exp(x) for x <= 0 to 4e-6 relative above -10, to 2e-5 above -24, 4e-11 below, NaN for NaN. No gradient.

    exp(x) = exp(x / 16)^16, the inner one by a polynomial: only products and sums, which g++ vectorises.
    """
    return _polynomial_exp(x) if scalar_exp() else mx.exp(x)


def _alone(x: mx.array) -> mx.array:
    """Keep an operation out of a fused loop: a long one is cut by `mx.compile` where more passes through memory."""
    return mx.contiguous(x)


def _spread(operation: Callable[[mx.array, mx.array], mx.array], x: mx.array, y: mx.array) -> mx.array:
    """operation(x, y) with y broadcast to the shape of x, as a loop of its own on a CPU: that one is vectorised, and a
    fused one with a broadcast operand, which takes 2.5 times as long, is not. No gradient."""
    if not scalar_exp():
        return operation(x, y)
    (y,) = mx.depends([mx.broadcast_to(y, x.shape)], [x])
    return _alone(operation(x, y))


def _by_pairs(coefficients: tuple[float, ...], x: mx.array) -> mx.array:
    """The polynomial c0 + c1 x + ..., by Estrin's scheme: `mx.compile` cuts a chain as long as Horner's in parts."""
    terms: list[Any] = list(coefficients)
    while len(terms) > 1:
        terms = [a + b * x if b is not None else a for a, b in zip_longest(terms[::2], terms[1::2])]
        x = x * x
    return terms[0]


@mx.compile
def _polynomial_exp(x: mx.array) -> mx.array:
    p = _by_pairs(COEFFICIENTS, mx.maximum(x, FLOOR))
    for _ in range(SQUARINGS):
        p = p * p
    return p


def _sigmoid(x: mx.array) -> mx.array:
    e = _alone(_polynomial_exp(-mx.abs(x)))
    return mx.where(x < 0, e, 1.0) / (1.0 + e)


@custom_function
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


@custom_function
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
    return _blocked_attention(*map(mx.contiguous, (q * scale, k, v)))[0]


def block_length(length: int) -> int:
    """Queries and keys at a time: few enough that little is computed that no query sees, and at most eight blocks, as
    with more the lanes of a step no longer overlap (docs/decisions.md)."""
    return max(128, min(512, length // 4), -(-length // 8))


def _cut(x: mx.array) -> list[mx.array]:
    block = block_length(x.shape[2])
    return [x[:, :, start : start + block] for start in range(0, x.shape[2], block)]


def _join(blocks: list[mx.array]) -> mx.array:
    """Blocks [B, H, l, D] to [B, H, L, D], laid out as [B, L, H, D]: joining the heads then copies nothing."""
    return mx.concatenate([x.swapaxes(1, 2) for x in blocks], axis=1).swapaxes(1, 2)


def exp_shifted(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return (exp(x - top), top), top the maximum over axis -2 (kept): there reductions are vectorised."""
    top = x.max(axis=-2, keepdims=True)
    return exp_nonpositive(_spread(mx.subtract, x, top)), top


@custom_function
def _blocked_attention(q: mx.array, k: mx.array, v: mx.array):
    """Scores are kept as keys x queries, so that softmax reduces over axis -2; only blocks on the diagonal are masked.

    Returns (out, the sums of each block of queries..., exp of the shifted scores of each pair of blocks...): with those
    the backward pass needs no exp. Nothing of the size of the scores is divided by the sums.
    """
    outs, totals, kept = [], [], []
    n = min(block_length(q.shape[2]), q.shape[2])
    visible = _alone((mx.arange(n)[:, None] <= mx.arange(n)).astype(q.dtype))
    hidden = _alone((visible - 1) * 1e30)
    keys, values = _cut(k), _cut(v)
    for i, rows in enumerate(_cut(q)):
        m, turned = rows.shape[2], rows.swapaxes(-1, -2)
        scores = [_alone(keys[j] @ turned) for j in range(i)]
        scores.append(_spread(mx.add, keys[i] @ turned, hidden[:m, :m]))
        top = functools.reduce(mx.maximum, [s.max(axis=-2, keepdims=True) for s in scores])
        e = [_alone(exp_nonpositive(_spread(mx.subtract, s, top))) for s in scores]
        e[i] = _spread(mx.multiply, e[i], visible[:m, :m])
        total = functools.reduce(mx.add, [x.sum(axis=-2) for x in e])[..., None]
        outs.append(functools.reduce(mx.add, [x.swapaxes(-1, -2) @ y for x, y in zip(e, values, strict=False)]) / total)
        totals.append(total)
        kept += e
    return _join(outs), *totals, *kept


@_blocked_attention.vjp
def _blocked_attention_backward(primals, cotangents, outputs):
    queries, keys, values, d_outs, outs = map(_cut, (*primals, cotangents[0], outputs[0]))
    n = len(queries)
    totals, kept = outputs[1 : 1 + n], iter(outputs[1 + n :])
    dq: list[mx.array] = []
    dk: list[list[mx.array]] = [[] for _ in range(n)]
    dv: list[list[mx.array]] = [[] for _ in range(n)]
    for i in range(n):
        d = _alone(d_outs[i] / totals[i])
        inner = (d * outs[i]).sum(axis=-1)[:, :, None]
        turned, parts = d.swapaxes(-1, -2), []
        for j in range(i + 1):
            e = next(kept)
            ds = _alone(e * _spread(mx.subtract, values[j] @ turned, inner))
            parts.append(ds.swapaxes(-1, -2) @ keys[j])
            dk[j].append(ds @ queries[i])
            dv[j].append(e @ d)
        dq.append(functools.reduce(mx.add, parts))
    return _join(dq), *(_join([functools.reduce(mx.add, parts) for parts in d]) for d in (dk, dv))


@custom_function
def added(x: mx.array, bias: mx.array) -> mx.array:
    """x + bias in the dtype of x, for x [..., d] and an fp32 bias [d], whose gradient is summed in fp32: autodiff would
    sum that of x over all tokens in bf16."""
    return x + bias.astype(x.dtype)


@added.vjp
def _added_backward(primals, cotangent, _):
    return cotangent, _over_tokens(cotangent).astype(primals[1].dtype)


@custom_function
def scaled(x: mx.array, weight: mx.array) -> mx.array:
    """x * weight in the dtype of x, for x [..., d] and an fp32 weight [d], whose gradient is summed in fp32."""
    return x * weight.astype(x.dtype)


@scaled.vjp
def _scaled_backward(primals, cotangent, _):
    x, weight = primals
    products = cotangent.astype(mx.float32) * x.astype(mx.float32)
    return cotangent * weight.astype(x.dtype), _over_tokens(products).astype(weight.dtype)


def _over_tokens(x: mx.array) -> mx.array:
    """[..., d] summed over all axes but the last, fp32 [d]."""
    return sums.summed(x.reshape(-1, x.shape[-1]))


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
"""(Phi(x) - 1/2) / x for |x| <= 4.25 as a polynomial in x^2: its Chebyshev interpolant of degree 8."""


@mx.compile
def _gelu_exact(x: mx.array) -> mx.array:
    """To 7e-5 of max(1, |x|)."""
    z = mx.minimum(mx.maximum(x, -PHI_EDGE), PHI_EDGE)
    return x * (0.5 + z * _by_pairs(PHI, z * z))


def gelu_exact(x: mx.array) -> mx.array:
    """x * Phi(x), as BERT has it. No gradient."""
    return _gelu_exact(x) if scalar_exp() else nn.gelu(x)


def masked_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, hidden: mx.array) -> mx.array:
    """softmax(q k^T * scale + hidden) v, in both directions, for q, k, v [B, H, L, D]; no gradient.

    hidden: fp32 [B, L], 0 for keys that are seen and -1e9 for padding. Returns [B, H, L, D].
    """
    if not scalar_exp():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=hidden[:, None, None, :].astype(q.dtype))
    e, _ = exp_shifted(_spread(mx.add, k @ (q * scale).swapaxes(-1, -2), hidden[:, None, :, None]))
    out = e.swapaxes(-1, -2) @ v
    return out / e.sum(axis=-2)[..., None]

"""Sums whose error their shape bounds, not the library below: blocks of 64, then the sums of those, and so on.

What one call adds up is only as exact as the routine that this processor gets: MLX's own sum on a CPU is one running
fp32 sum (4 % off at 2 x 10^7 squares), and an inner product is a matrix product of one row and one column (1e-3 off
there with one BLAS on one processor, exact on another). Added in blocks, n numbers are off by at most

    63 ceil(log64 n) u sum |x|,    u = 2^-24

whatever the order within a block (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2). Nothing else in
this package may add up more than 10^4 numbers in one call of MLX (docs/decisions.md has the list).
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

BLOCK = 64


def summed(x: mx.array) -> mx.array:
    """Sum over the first axis, fp32: [n, ...] -> [...]."""
    x = x.astype(mx.float32)
    while len(x) > BLOCK:
        x = _of_blocks(x)
    return x.sum(axis=0)


def total(x: mx.array) -> mx.array:
    """Sum of all numbers of an array, fp32 scalar."""
    return summed(x.reshape(-1))


def dot(a: mx.array, b: mx.array) -> mx.array:
    """sum a * b of two arrays of one shape, fp32 scalar."""
    return total(a.astype(mx.float32) * b.astype(mx.float32))


def sum_of_squares(arrays: Iterable[mx.array]) -> mx.array:
    """Sum of the squares of all numbers of some arrays, fp32 scalar."""
    return summed(mx.concatenate([_of_blocks(mx.square(x.reshape(-1).astype(mx.float32))) for x in arrays]))


def _of_blocks(x: mx.array) -> mx.array:
    """Sums of blocks of 64 along the first axis; what is over is a block of its own."""
    whole = len(x) // BLOCK * BLOCK
    parts = x[:whole].reshape(-1, BLOCK, *x.shape[1:]).sum(axis=1)
    return parts if whole == len(x) else mx.concatenate([parts, x[whole:].sum(axis=0, keepdims=True)])

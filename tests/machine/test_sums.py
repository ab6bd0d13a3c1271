import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_slm.machine import sums

U = 2.0**-24


def bound(n: int) -> float:
    """Of the error of a sum of n numbers, as a part of the sum of their magnitudes."""
    return 63 * max(1, math.ceil(math.log(max(n, 2), sums.BLOCK))) * U


@pytest.mark.parametrize("n", [1, 63, 64, 65, 4096, 4097, 262_145, 1_000_003])
def test_every_length_within_the_bound_of_its_blocks(n):
    x = np.random.default_rng(n).normal(size=n).astype(np.float32) + 0.5
    wide = x.astype(np.float64)
    assert abs(sums.total(mx.array(x)).item() - wide.sum()) <= bound(n) * np.abs(wide).sum()
    squares = float((wide**2).sum())
    for found in (sums.dot(mx.array(x), mx.array(x)), sums.sum_of_squares([mx.array(x)])):
        assert abs(found.item() / squares - 1) <= bound(n) + U


def test_a_count_beyond_2_to_the_24_is_exact():
    """One running fp32 sum of ones ends at 16,777,216, whatever follows."""
    assert sums.total(mx.ones((20_000, 1000))).item() == 20_000_000


def test_over_the_first_axis_alone():
    x = np.random.default_rng(0).random((10_000, 7, 3), np.float32)
    found = np.array(sums.summed(mx.array(x)), np.float64)
    exact = x.sum(axis=0, dtype=np.float64)
    assert found.shape == (7, 3) and np.abs(found / exact - 1).max() <= bound(10_000)


def test_half_precision_is_added_in_fp32():
    ones = mx.ones(100_000, mx.bfloat16)
    assert sums.total(ones).item() == sums.dot(ones, ones).item() == sums.sum_of_squares([ones, ones[:0]]).item() == 1e5

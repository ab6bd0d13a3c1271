"""What a benchmark is: something to repeat, and what one repetition achieves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def no_memory() -> None:
    """For what MLX allocates nothing of."""


def mlx_peak() -> int:
    """Peak bytes of MLX's allocator in this process."""
    import mlx.core as mx

    return mx.get_peak_memory()


@dataclass
class Case:
    """`work` does it once and waits; it takes `flops` operations and moves at least `bytes`.

    `memory` gives the peak in bytes; `size` names the size where the benchmark's own does not; `timed`: `work` returns
    its own seconds; `keep` is what must live as long as the case.
    """

    work: Callable[[], object]
    amount: float
    unit: str
    flops: float | None = None
    bytes: float | None = None
    memory: Callable[[], int | None] = mlx_peak
    size: str | None = None
    timed: bool = False
    keep: object = None


def random(*shape: int, seed: int = 0):
    """Normal numbers in the compute dtype."""
    import mlx.core as mx

    from mlx_slm.machine import runtime

    found = mx.random.normal(shape, key=mx.random.key(seed)).astype(runtime.compute_dtype())
    mx.eval(found)
    return found


def batch(size, rows: int):
    """(tokens int32 [rows, context + 1], weights fp32 [rows, context]) of unpadded random rows."""
    import numpy as np

    tokens = np.random.default_rng(0).integers(2, size.vocab_size, (rows, size.context + 1)).astype(np.int32)
    return tokens, np.ones((rows, size.context), np.float32)


def named(*functions: Callable) -> dict[str, Callable]:
    return {function.__name__: function for function in functions}

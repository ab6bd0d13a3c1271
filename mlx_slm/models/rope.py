"""Rotary positions whose long wavelengths are stretched, as Llama 3.1 has them (`rope_type: llama3` on the Hub).

wavelength 2 pi b^(2i/d)        it turns h or more times in the first context: as it is
                                it turns l times or less: times f
                                between: divided by (1 - s) / f + s,  s = (turns - l) / (h - l)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pydantic import Field, StrictFloat, StrictInt, model_validator

from mlx_slm.fields import MAX_DIMENSION, Form

Positive = Annotated[StrictFloat | StrictInt, Field(gt=0, le=1e6, allow_inf_nan=False)]


@dataclass(frozen=True)
class RopeScaling:
    factor: float
    """f, of the longest."""
    low_freq_factor: float
    """l, turns."""
    high_freq_factor: float
    """h, turns."""
    original_max_position_embeddings: int
    """The first context, tokens."""

    def factors(self, dims: int, base: float) -> np.ndarray:
        """What each wavelength of heads of `dims` numbers is multiplied by, float64 [dims / 2]."""
        turns = self.original_max_position_embeddings / (2 * math.pi * _wavelengths(dims, base))
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = np.clip(smooth, 0, 1)
        return 1 / ((1 - smooth) / self.factor + smooth)


class RopeScalingForm(Form):
    """`rope_scaling` of a record or a config.json."""

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Annotated[StrictInt, Field(ge=1, le=MAX_DIMENSION)]

    @model_validator(mode="after")
    def ordered(self) -> RopeScalingForm:
        self.require_order(self.low_freq_factor, self.high_freq_factor)
        return self

    @staticmethod
    def require_order(low: float | None, high: float | None) -> None:
        """Raise ValueError for bounds that leave nothing between them."""
        if low is not None and high is not None and high <= low:
            raise ValueError(f"high_freq_factor {high:g} is not above low_freq_factor {low:g}")


class ScaledRope(nn.Module):
    """As `nn.RoPE`, with the wavelengths of a `RopeScaling`."""

    def __init__(self, dims: int, base: float, scaling: RopeScaling):
        super().__init__()
        self.dims = dims
        self._wavelengths = mx.array(_wavelengths(dims, base) * scaling.factors(dims, base), mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rope(x, self.dims, traditional=False, base=None, scale=1.0, offset=0, freqs=self._wavelengths)


def _wavelengths(dims: int, base: float) -> np.ndarray:
    """Divided by 2 pi, in tokens."""
    return float(base) ** (np.arange(0, dims, 2) / dims)

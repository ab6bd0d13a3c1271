"""Sizes as they are written (1M, 32k), and the bounds of numbers that come from a user or a file.

The strict types are for files that programs write: there 1 is no 1.0, and "1M" no number.
"""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictFloat, StrictInt

MAX_DIMENSION, MAX_LAYERS, MAX_CLUSTERS = 1 << 22, 1000, 1 << 20
"""Wide: beyond them a number would make a tensor, a loop or a file name of somebody else's choice."""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def parse_size(value) -> int:
    """'1M' -> 1000000, '2.5B' -> 2500000000, 4096 -> 4096. Raises ValueError for anything else."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMbBgGtT]?)", value.strip().replace("_", ""))
        if not match:
            raise ValueError(f"{value!r} is not a size such as 4096, 32k, 1M or 2.5B")
        value = float(match[1]) * UNITS[match[2].lower()]
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value != int(value) or value < 0:
        raise ValueError(f"{value!r} is not a size such as 4096, 32k, 1M or 2.5B")
    if value >= 10**18:
        raise ValueError(f"{value!r} is too large")
    return int(value)


def _not_a_switch(value):
    """YAML's yes and on are no numbers, though Python counts with them."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number")
    return value


def _a_part(value):
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 <= value < 1:
        raise ValueError(f"{value:g} is no share: give a number from 0 to below 1, such as 0.2 for a fifth")
    return value


def _auto(value):
    return None if value == "auto" else value


def format_size(value: int) -> str:
    """1000000 -> '1M', 250000 -> '250k', 4097 -> '4097': the shortest exact form, as in names of runs."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= scale and value % (scale // 10) == 0:
            return f"{value / scale:g}{unit}"
    return str(value)


Size = Annotated[int, BeforeValidator(parse_size)]
PositiveSize = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Dimension = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=MAX_DIMENSION)]
"""Of a matrix, a vocabulary, a context or a batch."""
DimensionOrAuto = Annotated[Dimension | None, BeforeValidator(_auto)]
"""`auto` and nothing are the same: the default, which depends on the rest."""
Layers = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=MAX_LAYERS)]
Clusters = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=MAX_CLUSTERS)]
Branches = Annotated[int, BeforeValidator(parse_size), Field(gt=1, le=MAX_CLUSTERS)]
Steps = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=10**9)]
Rounds = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=10_000)]
"""Of k-means."""
Real = Annotated[float, BeforeValidator(_not_a_switch), Field(allow_inf_nan=False)]
Fraction = Annotated[Real, Field(ge=0, lt=1)]
Share = Annotated[Fraction, BeforeValidator(_a_part)]
"""Of rows, of groups, of a horizon."""
Rate = Annotated[Real, Field(gt=0, le=100)]
Multiple = Annotated[Real, Field(gt=0, le=10_000)]
Hours = Annotated[Real, Field(gt=0, le=10**6)]
RopeTheta = Annotated[Real, Field(ge=1, le=10**12)]
NormEps = Annotated[Real, Field(gt=0, le=1)]
Seed = Annotated[int, BeforeValidator(_not_a_switch), Field(ge=0, lt=2**32)]

StrictDimension = Annotated[StrictInt, Field(ge=1, le=MAX_DIMENSION)]
"""Of a matrix, a vocabulary or a context."""
StrictRopeTheta = Annotated[StrictFloat | StrictInt, Field(ge=1, le=10**12)]
StrictNormEps = Annotated[StrictFloat | StrictInt, Field(gt=0, le=1)]


class Form(BaseModel):
    """Of a JSON file; other keys are allowed, and not looked at."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

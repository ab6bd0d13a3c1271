"""The families that there are."""

from __future__ import annotations

from mlx_slm.models.family import Family
from mlx_slm.models.gpt2 import GPT2
from mlx_slm.models.llama import Llama
from mlx_slm.models.qwen2 import Qwen2
from mlx_slm.models.qwen3 import Qwen3

FAMILIES: dict[str, Family] = {family.name: family for family in (GPT2(), Llama(), Qwen2(), Qwen3())}


def known_family(name: str) -> str:
    """`name`, if it is that of a family; raises ValueError with those that there are."""
    if name not in FAMILIES:
        raise ValueError(f"{name!r} is not a family that is known: {', '.join(FAMILIES)}")
    return name

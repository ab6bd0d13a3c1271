"""The methods: one file each. `METHODS` lists them in the order of the tables."""

from __future__ import annotations

from mlx_slm.errors import SlmError, nearest
from mlx_slm.methods.base import Method
from mlx_slm.methods.distilled import Distilled
from mlx_slm.methods.importance import Continued, ImportanceSampling
from mlx_slm.methods.lora import LowRank
from mlx_slm.methods.mixture import Mixture
from mlx_slm.methods.plain import Large, Small
from mlx_slm.methods.projected import ProjectedNetwork
from mlx_slm.methods.scratch import Scratch

METHODS: list[Method] = [
    Small(),
    Scratch(),
    ImportanceSampling(),
    Continued(),
    ProjectedNetwork(),
    Mixture(),
    Distilled(),
    Large(),
    LowRank(),
]


def find_method(name: str) -> Method:
    """The method of this name; raises SlmError with those that there are."""
    methods = {method.name: method for method in METHODS}
    if name not in methods:
        raise SlmError(f"no method {name!r}{nearest(name, list(methods))}; methods: {', '.join(methods)}")
    return methods[name]

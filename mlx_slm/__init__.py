"""mlx-slm: small, specialised language models on MLX (arXiv 2402.01093).

    from mlx_slm import Project, Specialisation, pretrain, specialize

What the commands do (docs/python.md). Import this package before `mlx`: on Linux it loads a fast BLAS first, without
which matrix products are 30x slower. What is named here is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_slm.machine import runtime

if TYPE_CHECKING:
    from mlx_slm.clustering.target import SamplingTarget
    from mlx_slm.errors import SlmError
    from mlx_slm.evaluation.evaluate import evaluate
    from mlx_slm.export.generate import Sampling, stream
    from mlx_slm.methods.requests import Pretraining, Specialisation
    from mlx_slm.planning.plan import Budgets, make_plan
    from mlx_slm.project import Project
    from mlx_slm.stages.pretrain import pretrain
    from mlx_slm.stages.specialize import specialize
    from mlx_slm.text.prepare import prepare
    from mlx_slm.text.sources import Preparation

__version__ = "0.1.0"

_HOMES = {
    "clustering.target": ["SamplingTarget"],
    "errors": ["SlmError"],
    "evaluation.evaluate": ["evaluate"],
    "export.generate": ["Sampling", "stream"],
    "methods.requests": ["Pretraining", "Specialisation"],
    "planning.plan": ["Budgets", "make_plan"],
    "project": ["Project"],
    "stages.pretrain": ["pretrain"],
    "stages.specialize": ["specialize"],
    "text.prepare": ["Preparation", "prepare"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Budgets",
    "Preparation",
    "Pretraining",
    "Project",
    "Sampling",
    "SamplingTarget",
    "SlmError",
    "Specialisation",
    "evaluate",
    "make_plan",
    "prepare",
    "pretrain",
    "specialize",
    "stream",
]

runtime.prepare()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_slm' has no attribute {name!r}")
    return getattr(import_module(f"mlx_slm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""Pretraining: request -> method -> setup -> job -> trainer -> model (section 2)."""

from __future__ import annotations

import dataclasses

from mlx_slm.machine.ranks import ranks
from mlx_slm.methods import find_method
from mlx_slm.methods.requests import Pretraining
from mlx_slm.project import Project
from mlx_slm.stages.setup import make_setup
from mlx_slm.training.runs import Run


def pretrain(project: Project, request: Pretraining) -> Run:
    """Train the model of a method on the generic set; a single model is exported to `models/<name>`.

    Prepares and clusters what was not. Returns the finished run; raises SlmError, or Interrupted after saving.
    """
    method = find_method(request.method)
    path = project.workspace.run(request.name or method.run_name(request))
    method.check(project, request)
    setup = ranks().in_turn(lambda: make_setup(project, method, request, path))
    return method.pretrain(dataclasses.replace(setup, tokens=ranks().from_first(setup.tokens)), request)

"""One more method, to show that one file is enough: the average of a mixture's experts, trained on for a step."""

from __future__ import annotations

import dataclasses

import numpy as np
from mlx.utils import tree_map

from mlx_slm.methods.base import Setup
from mlx_slm.methods.mixture import Mixture
from mlx_slm.methods.requests import Pretraining
from mlx_slm.methods.work import plain_job, work
from mlx_slm.text.rows import Stream
from mlx_slm.training.runs import Run, open_expert


class Soup(Mixture):
    name, label, color = "soup", "SLM-soup", "C8"
    summary = "average of a hard mixture"
    one_model, takes_experts, selects = True, False, ()
    paper_perplexity = None

    def pretrain(self, setup: Setup, request: Pretraining) -> Run:
        """The ingredients lie in a run beside its own."""
        beside = dataclasses.replace(setup, path=setup.path.with_name(f"{setup.path.name}-ingredients"))
        mixture = super().pretrain(beside, request)
        experts = [open_expert(mixture, number).weights() for number in range(setup.project.config.mixture.k)]
        average = tree_map(lambda *values: sum(values) / len(values), *experts)
        inputs = setup.inputs(self.name) | {"ingredients": mixture.identity}
        job = plain_job(setup, inputs, [Stream(setup.store)], np.ones(1), parameters=lambda: average, steps=1)
        return work(setup.project, job, request.fresh, export=True)

"""SLM and LLM: one transformer on the generic set as it is, small or large."""

from __future__ import annotations

import numpy as np

from mlx_slm.methods.base import Cost, Method, Setup, TrainingJob, Trains
from mlx_slm.methods.costs import Spending
from mlx_slm.methods.requests import Pretraining
from mlx_slm.methods.work import plain_job
from mlx_slm.text.rows import Stream


class Small(Method):
    name, label, color = "slm", "SLM", "C0"
    summary = "small model"
    paper_perplexity = (18.2, 14.8, 12.0)

    def job(self, setup: Setup, request: Pretraining) -> TrainingJob:
        return plain_job(setup, setup.inputs(self.name), [Stream(setup.store)], np.ones(1))


class Large(Small):
    name, label, color = "llm", "LLM", "C5"
    summary = "large model"
    trains = Trains.LARGE
    teaches = True
    paper_perplexity = (14.4, 12.5, 10.0)

    def cost(self, spending: Spending) -> Cost:
        return Cost(spending.generic_hours, spending.tokens(self.name) * spending.rates.llm)

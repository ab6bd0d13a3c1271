"""SLM-nopt: no pretraining, a small model trained on the domain alone."""

from __future__ import annotations

from mlx_slm.methods.base import Method, Rows
from mlx_slm.methods.costs import Cost, Spending
from mlx_slm.methods.requests import SCRATCH, Specialisation


class Scratch(Method):
    name, label, color = "nopt", "SLM-nopt", "#888888"
    summary = "small model on the domain alone"
    rows = Rows.NONE
    paper_perplexity = (227.1, 45.6, 17.6)

    def claims(self, request: Specialisation) -> bool:
        return request.source == SCRATCH

    def cost(self, spending: Spending) -> Cost:
        return Cost(0.0, super().cost(spending).specialization)

    @property
    def is_per_domain(self) -> bool:
        return True

    def pretrained(self, budget: int | None, other_budget: int | None) -> dict[str, int]:
        return {}

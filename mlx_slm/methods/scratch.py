"""SLM-nopt: no pretraining, a small model trained on the domain alone."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_slm.config.schema import Config
from mlx_slm.errors import SlmError
from mlx_slm.finetuning.domain import DomainSet
from mlx_slm.finetuning.finetune import Finetuning
from mlx_slm.methods.base import Method, Rows
from mlx_slm.methods.costs import Cost, Spending
from mlx_slm.methods.requests import SCRATCH, Specialisation
from mlx_slm.methods.starts import Start
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import initialise
from mlx_slm.project import Project
from mlx_slm.training.runs import Run


@dataclass(frozen=True)
class FromScratch(Start):
    @property
    def what(self) -> str:
        return "training from scratch"

    @property
    def origin(self) -> dict | str:
        return SCRATCH

    def shape(self, config: Config, vocab_size: int, context_length: int) -> Shape:
        return Shape.of(config.model, vocab_size, context_length)

    def runs(self, project: Project) -> list[Run]:
        return []

    def train(self, project: Project, run: Run, job: Finetuning, domain: DomainSet) -> None:
        job.work(run, initialise(job.shape, job.config.finetuning.seed))


class Scratch(Method):
    name, label, color = "nopt", "SLM-nopt", "#888888"
    summary = "small model on the domain alone"
    rows = Rows.NONE
    paper_perplexity = (227.1, 45.6, 17.6)

    def claims(self, request: Specialisation) -> bool:
        return request.source == SCRATCH

    def start(self, project: Project, request: Specialisation, source: Run | None) -> Start:
        if source:
            return super().start(project, request, source)
        if request.select:
            raise SlmError(
                f"--select {request.select}: training from scratch has no experts to choose from; it is for methods pn "
                "and mix"
            )
        return FromScratch(self.name, None)

    def cost(self, spending: Spending) -> Cost:
        return Cost(0.0, super().cost(spending).specialization)

    @property
    def is_per_domain(self) -> bool:
        return True

    def pretrained(self, budget: int | None, teacher_budget: int | None) -> dict[str, int]:
        return {}

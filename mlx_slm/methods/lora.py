"""LoRA (appendix F): adapters of a large model's query and value projections, the model itself frozen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from mlx_slm.config.schema import Config, Recipe
from mlx_slm.errors import SlmError
from mlx_slm.experts.experts import has_experts
from mlx_slm.export.start import Pretrained
from mlx_slm.finetuning.domain import DomainSet
from mlx_slm.finetuning.finetune import Finetuning
from mlx_slm.methods.base import Method, Models, Rows, Trains
from mlx_slm.methods.costs import Cost, Rates, Spending
from mlx_slm.methods.plain import Large
from mlx_slm.methods.requests import Specialisation
from mlx_slm.methods.starts import FromPublished, Start, Whole
from mlx_slm.models.lora import Lora
from mlx_slm.models.shape import Shape
from mlx_slm.project import Project
from mlx_slm.training.runs import Run
from mlx_slm.training.step import Objective, training_bytes

PAPER_RANK = 64


@dataclass(frozen=True)
class WithAdapters(Start):
    start: Whole
    rank: int
    scale: float
    multiple: float

    @property
    def label(self) -> str:
        return f"{self.start.label}-{self.method}" if isinstance(self.start, FromPublished) else self.method

    @property
    def what(self) -> str:
        return f"{self.start.what} with LoRA of rank {self.rank}"

    @property
    def origin(self) -> dict | str:
        return self.start.origin

    @property
    def published(self) -> dict | None:
        return self.start.published

    def rate(self, config: Config, recipe: Recipe) -> float:
        return self.multiple * self.start.rate(config, recipe)

    def shape(self, config: Config, vocab_size: int, context_length: int) -> Shape:
        return self.start.shape(config, vocab_size, context_length)

    def runs(self) -> list[Run]:
        return self.start.runs()

    def inputs(self, config: Config) -> dict:
        return {"lora": {"rank": self.rank, "scale": self.scale}}

    def train(self, project: Project, run: Run, job: Finetuning, domain: DomainSet) -> None:
        lora = Lora(job.shape, self.rank, self.scale)
        job = replace(
            job,
            objective=Objective(plain=partial(lora.applied, self.start.parameters(project, job))),
            flops_per_token=lora.flops_per_token,
            extra_bytes=-lora.bytes_spared,
        )
        job.work(run, lora.initialise(job.config.finetuning.seed))


class LowRank(Method):
    name, label, color = "lora", "LLM-lora", "C6"
    summary = "LoRA adapters of a large model"
    trains, rows = Trains.LARGE, Rows.NONE

    def claims(self, request: Specialisation) -> bool:
        return request.lora is not None

    def start(self, project: Project, request: Specialisation, source: Run | Pretrained | None) -> Start:
        if request.lora is None:
            return super().start(project, request, source)
        if request.teacher:
            raise SlmError("--lora and --teacher: a student is fine-tuned as a whole; give one of the two")
        if source is None or (isinstance(source, Run) and has_experts(source)):
            what = f"run {source.name} has experts" if source else "there is none"
            raise SlmError(f"--lora adapts one pretrained model, and {what}: name another run with --from")
        start = super().start(project, request, source)
        assert isinstance(start, Whole)
        if isinstance(source, Run) and not source.finished and source.milestone is None:
            raise SlmError(
                f"--lora: run {source.name} is not finished, and an adapter needs a base that stays: train it on"
            )
        if request.lora > source.shape.dims:
            called = f"run {source.name}" if isinstance(source, Run) else source.name
            raise SlmError(f"--lora {request.lora}: the matrices of {called} have rank {source.shape.dims} at the most")
        settings = project.config.lora
        return WithAdapters(self.name, start, request.lora, settings.scale, settings.rate)

    def pretraining_tokens(self, spending: Spending) -> int | None:
        return int(spending.generic_hours / self.rate(spending.rates))

    def cost(self, spending: Spending) -> Cost:
        return Cost(spending.generic_hours, spending.tokens(self.name) * spending.rates.lora)

    def memory(self, models: Models) -> float:
        recompute = models.config.training.recompute_layers is not False
        return training_bytes(models.large, 1, recompute) - adapters_of(models.large).bytes_spared

    def rate(self, rates: Rates) -> float:
        return rates.llm

    def pretrained(self, budget: int | None, teacher_budget: int | None) -> dict[str, int]:
        return {Large.name: budget or 0}

    def check_study(self, config: Config) -> None:
        if config.study.lora_rank > config.large.dims:
            raise SlmError(f"study.lora_rank {config.study.lora_rank} is more than large.dims {config.large.dims}")

    def specialisation(self, config: Config, starts: list[str]) -> dict:
        return {"lora": config.study.lora_rank}

    def of_study(self, config: Config) -> int | None:
        return config.study.lora_rank


def adapters_of(large: Shape) -> Lora:
    """Adapters of the paper's rank, as far as the model has it."""
    return Lora(large, min(PAPER_RANK, large.dims), 1.0)

"""What a domain's model starts from, and how it is then trained: beside those here, `lora` has adapters and `distilled`
students. `specialize` asks for the shape, for what goes into the record, and for the training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from mlx_slm.config.schema import Config, Recipe
from mlx_slm.experts.bundle import bundle_at
from mlx_slm.experts.experts import FINETUNED, PRETRAINED, Experts
from mlx_slm.export.model import check_directory, find_directory, weights_of
from mlx_slm.export.start import Pretrained, longest_context
from mlx_slm.files import read_json
from mlx_slm.finetuning.domain import DomainSet
from mlx_slm.finetuning.finetune import Finetuning, finetune_all
from mlx_slm.finetuning.selection import chosen, describe, select_expert
from mlx_slm.methods.requests import SCRATCH
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import initialise
from mlx_slm.project import Project
from mlx_slm.training.runs import Run


def find_published(project: Project, name: str | None, option: str) -> Pretrained | None:
    """The published model that an option names, where that is no run, no bundle and not `none`."""
    workspace = project.workspace
    if name in (None, SCRATCH) or name.partition("@")[0] in workspace.runs() or bundle_at(workspace, name):
        return None
    directory = find_directory(workspace, name)
    if directory is None:
        return None
    check_directory(directory)
    context = min(project.config.data.context_length, longest_context(read_json(directory / "config.json")) or 0)
    return Pretrained(directory, context or None, option)


@dataclass(frozen=True)
class Start(ABC):
    method: str
    """Of the model that comes out."""

    @property
    def label(self) -> str:
        """In the name of a run."""
        return self.method

    @property
    @abstractmethod
    def what(self) -> str:
        """What is done, in words."""

    @property
    @abstractmethod
    def origin(self) -> dict | str:
        """For the record."""

    @property
    def published(self) -> dict | None:
        """What a record says of the published model that it is, or goes back to over other runs."""
        return None

    @property
    def is_from_scratch(self) -> bool:
        return self.origin == SCRATCH

    def rate(self, config: Config, recipe: Recipe) -> float:
        """The learning rate."""
        return config.finetuning.learning_rate or config.training.learning_rate * recipe.rate

    @abstractmethod
    def shape(self, config: Config, vocab_size: int, context_length: int) -> Shape:
        """Of the model that is trained."""

    def runs(self) -> list[Run]:
        """The pretrained runs that must read the domain's windows."""
        return []

    def inputs(self, config: Config) -> dict:
        """What decides the outcome beside the origin, for the record."""
        return {}

    def ready(self, tune: Callable[[str, Run | Pretrained], Run]) -> Start:
        """The same once the runs that it needs are fine-tuned themselves, by `tune(name as asked for, run)`."""
        return self

    @abstractmethod
    def train(self, project: Project, run: Run, job: Finetuning, domain: DomainSet) -> None:
        """Fine-tune, or go on with it."""


class Whole(Start):
    """One model, all of whose weights are fine-tuned."""

    @abstractmethod
    def parameters(self, project: Project, job: Finetuning) -> dict:
        """Of the model before its fine-tuning."""

    def train(self, project: Project, run: Run, job: Finetuning, domain: DomainSet) -> None:
        job.work(run, self.parameters(project, job))


@dataclass(frozen=True)
class FromRun(Whole):
    """A pretrained run."""

    source: Run

    @property
    def what(self) -> str:
        return f"fine-tuning {self.source.name}"

    @property
    def origin(self) -> dict | str:
        return {"run": self.source.name, "step": self.source.weights_step(), "identity": self.source.identity}

    @property
    def published(self) -> dict | None:
        return self.source.published

    def shape(self, config: Config, vocab_size: int, context_length: int) -> Shape:
        return self.source.shape

    def runs(self) -> list[Run]:
        return [self.source]

    def parameters(self, project: Project, job: Finetuning) -> dict:
        return weights_of(project.workspace, self.source)


@dataclass(frozen=True)
class FromPublished(Whole):
    """A model that somebody published."""

    model: Pretrained

    @property
    def label(self) -> str:
        return self.model.label

    @property
    def what(self) -> str:
        return f"fine-tuning {self.model.name}"

    @property
    def origin(self) -> dict | str:
        return self.model.identity

    @property
    def published(self) -> dict | None:
        return self.model.facts

    def rate(self, config: Config, recipe: Recipe) -> float:
        return config.finetuning.learning_rate or config.finetuning.published_rate

    def shape(self, config: Config, vocab_size: int, context_length: int) -> Shape:
        return self.model.fitted(context_length).shape

    def parameters(self, project: Project, job: Finetuning) -> dict:
        return self.model.fitted(job.shape.context_length).parameters()


@dataclass(frozen=True)
class FromScratch(Whole):
    """Random weights of the small model."""

    @property
    def what(self) -> str:
        return "training from scratch"

    @property
    def origin(self) -> dict | str:
        return SCRATCH

    def shape(self, config: Config, vocab_size: int, context_length: int) -> Shape:
        return Shape.of(config.model, vocab_size, context_length)

    def parameters(self, project: Project, job: Finetuning) -> dict:
        return initialise(job.shape, job.config.finetuning.seed)


@dataclass(frozen=True)
class FromExperts(FromRun):
    """An expert of a run that has some, as `select` says (section 4.3)."""

    experts: Experts
    select: str

    @classmethod
    def of(cls, project: Project, source: Run, select: str) -> FromExperts:
        return cls(source.record["method"], source, Experts(project.workspace, source), select)

    @property
    def label(self) -> str:
        return f"{self.method}-{self.select}"

    def inputs(self, config: Config) -> dict:
        inputs: dict = {"select": self.select, "clusters": self.experts.clusters.fingerprint}
        if self.select == PRETRAINED:
            inputs["select_tokens"] = config.finetuning.select_tokens
        if self.select in (PRETRAINED, FINETUNED):
            inputs["experts"] = self.experts.require_trained()
        return inputs

    def train(self, project: Project, run: Run, job: Finetuning, domain: DomainSet) -> None:
        if self.select == FINETUNED:
            finetune_all(project.workspace, run, self.experts, job)
            return
        if "selection" not in run.record:
            run.record["selection"] = select_expert(project, self.experts, self.select, domain)
            run.save()
        project.report.line(f"starting from {describe(run.record['selection'])}")
        job.work(run, chosen(self.experts, run.record["selection"]))

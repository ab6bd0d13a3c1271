"""What a method says about itself. Each method is one file here; `METHODS` in the package lists them.

A method is a model and a distribution over clusters (docs/architecture.md): which model it trains, on which rows, what
it starts a domain's model from, and what that costs. Commands, planner and study ask, and know no method by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar

import numpy as np

from mlx_slm.config.schema import Config, ModelConfig
from mlx_slm.errors import SlmError
from mlx_slm.experts.experts import has_experts
from mlx_slm.export.start import Pretrained
from mlx_slm.machine.ranks import ranks
from mlx_slm.methods.costs import Cost, Rates, Spending
from mlx_slm.methods.requests import Pretraining, Specialisation
from mlx_slm.methods.starts import FromExperts, FromPublished, FromRun, FromScratch, Start
from mlx_slm.methods.work import TrainingJob, work
from mlx_slm.models.projected import ProjectedShape
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import initialise
from mlx_slm.project import Project
from mlx_slm.storage.records import fingerprint
from mlx_slm.text.store import Store
from mlx_slm.training.projected_step import resolved, resolved_groups
from mlx_slm.training.runs import Run
from mlx_slm.training.step import training_bytes

UNSEEN = {"report_every", "checkpoint_every", "checkpoint_minutes", "milestones"}
"""Settings of a training that change nothing of the model."""


class Trains(Enum):
    """The model that a method pretrains."""

    SMALL = "model"
    LARGE = "large"
    NETWORK = "projection"


class Rows(Enum):
    """What a method's pretraining reads."""

    GENERIC = "the generic set as it is"
    DOMAIN = "the generic set resampled to a domain"
    CLUSTER = "each model or expert a cluster"
    NONE = "nothing: it does not pretrain"


@dataclass(frozen=True)
class Models:
    """The models of a configuration."""

    config: Config
    """Its projection is `resolved`."""
    small: Shape
    large: Shape
    network: ProjectedShape

    @classmethod
    def of(cls, config: Config) -> Models:
        vocab, context = config.tokenizer.vocab_size, config.data.context_length
        small, large = (Shape.of(section, vocab, context) for section in (config.model, config.large))
        network = ProjectedShape.of(config.projection, small)
        settled = resolved(config.projection, config.training, network)
        return cls(config.model_copy(update={"projection": settled}), small, large, network)

    @property
    def tokens_per_group(self) -> float:
        """Of a step of the network."""
        return self.config.training.batch_rows * self.config.data.context_length / self.groups

    @property
    def groups(self) -> int:
        """Of rows in a step of the network."""
        return resolved_groups(self.config.projection)


@dataclass(frozen=True)
class Setup:
    """What every pretraining stands on: the generic set, the held-out windows of it, the model to train."""

    project: Project
    shape: Shape
    origin: Pretrained | None
    """The model to start from; None: random weights."""
    tokenizer: str
    """Its fingerprint."""
    store: Store
    valid: Store
    windows: np.ndarray
    """Of `valid`, those that decide about a training."""
    tokens: int | None
    """The horizon; None: as many passes as the configuration says."""
    path: Path
    """Of the run."""

    def start(self) -> dict:
        """Parameters of the model before any training."""
        return self.origin.parameters() if self.origin else initialise(self.shape, self.project.config.training.seed)

    def inputs(self, method: str) -> dict:
        """What a run is made from, for its record."""
        training = self.project.config.training
        inputs = {
            "method": method,
            "shape": self.shape.to_dict(),
            "training": training.recorded(UNSEEN),
            "tokenizer": self.tokenizer,
            "data": self.store.fingerprint,
            "valid": fingerprint([self.valid.fingerprint, self.windows.tolist()]),
        }
        return inputs | ({"init_from": self.origin.fingerprint} if self.origin else {})

    @property
    def published(self) -> dict | None:
        """What a record says of the published model that it starts from."""
        return self.origin.facts if self.origin else None

    def steps(self, rows: int, tokens: int | None) -> int:
        """Steps of a training on a set of `rows` rows; of `tokens` tokens where they are given."""
        training = self.project.config.training
        if tokens is not None:
            return math.ceil(tokens / (training.batch_rows * self.shape.context_length))
        return math.ceil((training.passes or 0) * rows / training.batch_rows)


class Method:
    """The answers of a small model that is pretrained on the generic set; each method changes what differs."""

    name: ClassVar[str]
    """In commands, names and records."""
    label: ClassVar[str]
    """In tables and figures."""
    summary: ClassVar[str]
    color: ClassVar[str]
    trains: ClassVar[Trains] = Trains.SMALL
    rows: ClassVar[Rows] = Rows.GENERIC
    section: ClassVar[str | None] = None
    """The section of the configuration whose k is its number of clusters."""
    pool: ClassVar[int] = 1
    """It gets this many times the text that it trains on, of a set that is streamed."""
    one_model: ClassVar[bool] = True
    """Whether its pretraining gives a model to export, and not experts."""
    milestones: ClassVar[bool] = True
    """Whether one pretraining keeps checkpoints at smaller budgets."""
    selects: ClassVar[tuple[str, ...]] = ()
    """How an expert can be chosen; the first is the default."""
    takes_experts: ClassVar[bool] = False
    """Whether some of its experts can be trained alone."""
    teaches: ClassVar[bool] = False
    """Whether its fine-tuned models go by the names of teachers, so that a study trains them once."""
    continues: ClassVar[str | None] = None
    """The method of the pretrained model that it goes on from."""
    other_budget: ClassVar[str | None] = None
    """The field of a study's grid with the tokens of a second pretraining that it needs."""
    paper_perplexity: ClassVar[tuple[float, float, float] | None] = None
    """Tables 4 and 8: the average of nine domains after fine-tuning on 1M, 8M and 64M tokens."""

    # Pretraining

    @property
    def pretrains(self) -> bool:
        """Whether `pretrain --method` takes it."""
        return self.rows is not Rows.NONE

    def run_name(self, request: Pretraining) -> str:
        """Of a run without a name of its own."""
        return self.name

    def check(self, project: Project, request: Pretraining) -> None:
        """Raise SlmError, before any long work, for settings that do not fit together."""
        if request.experts is not None and not self.takes_experts:
            raise SlmError(f"experts are not for method {self.name}")

    def model(self, config: Config) -> ModelConfig:
        """The section of the model that is trained, or of the expert."""
        return config.large if self.trains is Trains.LARGE else config.model

    def configured(self, project: Project, shape: Shape, path: Path, fresh: bool) -> tuple[Config, float]:
        """(the configuration with what this machine decides, hours of a token as a multiple of the model's own)."""
        return project.config, 1.0

    def job(self, setup: Setup, request: Pretraining) -> TrainingJob:
        """The pretraining."""
        raise NotImplementedError

    def pretrain(self, setup: Setup, request: Pretraining) -> Run:
        """Do it, or go on with it; returns the finished run."""
        job = ranks().in_turn(lambda: self.job(setup, request))
        return work(setup.project, job, request.fresh, export=self.one_model)

    # Specialisation

    def claims(self, request: Specialisation) -> bool:
        """Whether a specialisation is by this method whatever it starts from."""
        return False

    def start(self, project: Project, request: Specialisation, source: Run | Pretrained | None) -> Start:
        """What a domain's model starts from, where the source (None: random weights) is of this method, or the request
        is for it; raises SlmError for a request that does not fit."""
        if not isinstance(source, Run) or not has_experts(source):
            if request.select:
                what = (
                    f"run {source.name}"
                    if isinstance(source, Run)
                    else source.name
                    if source
                    else "training from scratch"
                )
                raise SlmError(
                    f"--select {request.select}: {what} has no experts to choose from; it is for methods pn and mix"
                )
            if isinstance(source, Pretrained):
                return FromPublished(self.name, source)
            return FromRun(source.record["method"], source) if source else FromScratch(self.name)
        select = request.select or self.selects[0]
        if select not in self.selects:
            other = f"is a {'mixture' if source.is_mixture else 'network'}"
            raise SlmError(f"--select {select} needs a projected network, and run {source.name} {other}")
        return FromExperts.of(project, source, select)

    # Planning

    def flops_per_token(self, models: Models) -> float:
        """Training FLOPs of a token in pretraining."""
        return self.shape(models).flops_per_token

    def shape(self, models: Models) -> Shape:
        """The model that a domain runs in the end."""
        return models.large if self.trains is Trains.LARGE else models.small

    def rate(self, rates: Rates) -> float:
        """Hours of a token in pretraining."""
        return rates.llm if self.trains is Trains.LARGE else rates.slm

    def pretraining_tokens(self, spending: Spending) -> int | None:
        """Tokens that it is pretrained on in its hours; None where it is not, or shares them."""
        if not self.pretrains:
            return None
        hours = spending.sampling_hours if self.rows is Rows.DOMAIN else spending.generic_hours
        return int(hours / self.rate(spending.rates))

    def cost(self, spending: Spending) -> Cost:
        """Hours before any domain is known, and per domain."""
        return Cost(spending.generic_hours, spending.tokens("slm") * spending.rates.slm)

    def memory(self, models: Models) -> float:
        """Bytes that training takes at the least, one row at a time."""
        return training_bytes(self.shape(models), 1, models.config.training.recompute_layers is not False)

    # Study

    @property
    def is_per_domain(self) -> bool:
        """Whether its pretraining is for one domain, and paid for each."""
        return self.rows is Rows.DOMAIN

    def pretrained(self, budget: int | None, other_budget: int | None) -> dict[str, int]:
        """The budget of each pretraining that a cell needs, by method; its own start comes first."""
        return {self.name: budget or 0}

    def check_study(self, config: Config) -> None:
        """Raise SlmError, before any training, for a study that this method cannot be part of."""

    def specialisation(self, config: Config, starts: list[str]) -> dict:
        """Fields of the Specialisation of a cell, beyond source, domain, tokens and select."""
        return {}

    def of_study(self, config: Config) -> int | None:
        """A setting of the section `study` that decides a cell of this method."""
        return None

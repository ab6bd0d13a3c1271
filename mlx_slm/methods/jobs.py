"""A method is a model and a distribution over clusters (DESIGN, "One idea carries the system"): here, each as a `Job`.

`slm` and `llm`: one transformer on the generic set as it is. `is`: on the generic set resampled to a domain. `pn`: one
projected network, each group of rows of one cluster and through its expert. `mix`: a transformer for each cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from mlx_slm.clustering.clusters import Clusters, as_made, ensure_clusters
from mlx_slm.clustering.target import Target, clusters_for, importance_of, inputs_of
from mlx_slm.config.schema import Config
from mlx_slm.errors import SlmError
from mlx_slm.export.start import Pretrained
from mlx_slm.models.projected import ProjectedShape, expert, initialise_network, network_of, tensor_rate
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.report import Report
from mlx_slm.storage.records import fingerprint
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.rows import Sampler, Stream
from mlx_slm.text.store import Store
from mlx_slm.training.optimizer import AdamW
from mlx_slm.training.projected_step import ProjectedStep, groups_that_fit
from mlx_slm.training.runs import IMPORTANCE, expert_path
from mlx_slm.training.scoring import routed_loss, validation_loss
from mlx_slm.training.step import TrainingStep, rows_that_fit

UNSEEN = {"report_every", "checkpoint_every", "checkpoint_minutes", "milestones"}
"""Settings of a training that change nothing of the model."""


@dataclass(frozen=True)
class Ground:
    """What every method stands on: the generic set, the held-out windows of it, the small model to train."""

    workspace: Workspace
    config: Config
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
    """The horizon; None: so many passes as the configuration says."""

    def start(self) -> dict:
        """Parameters of the small model before any training."""
        return self.origin.parameters() if self.origin else initialise(self.shape, self.config.training.seed)

    def inputs(self, method: str) -> dict:
        """What tells one run from another, for its record."""
        found = {
            "method": method,
            "shape": self.shape.to_dict(),
            "training": self.config.training.model_dump(mode="json", exclude=UNSEEN),
            "tokenizer": self.tokenizer,
            "data": self.store.fingerprint,
            "valid": fingerprint([self.valid.fingerprint, self.windows.tolist()]),
        }
        return found | ({"init_from": self.origin.fingerprint} if self.origin else {})

    def steps(self, rows: int, tokens: int | None) -> int:
        """Steps of a training on so many rows a pass."""
        training = self.config.training
        if tokens is not None:
            return math.ceil(tokens / (training.batch_rows * self.shape.context_length))
        return math.ceil(training.passes * rows / training.batch_rows)


@dataclass(frozen=True)
class Job:
    """One training: what it is, its rows, its start, its step and its score."""

    path: Path
    inputs: dict
    parameters: Callable[[], dict]
    step: Callable
    """(parameters, moments) -> the step that moves them."""
    sampler: Sampler
    steps: int
    evaluate: Callable[[dict], float]
    num_parameters: int
    flops_per_token: float
    lines: str = ""
    """What the user should read before it starts."""
    files: dict = field(default_factory=dict)
    """JSON to lie in the run, by name."""


def check_method(config: Config, method: str, init_from: Path | None, experts: list[int] | None) -> None:
    """Raise SlmError, before any long work, for settings that do not fit together."""
    training, projection = config.training, config.projection
    beyond = [number for number in experts or [] if number >= config.mixture.k]
    if beyond:
        raise SlmError(
            f"--experts {beyond[0]}: the mixture has the experts 0 to {config.mixture.k - 1} (mixture.k = "
            f"{config.mixture.k})"
        )
    if method != "pn":
        return
    groups = projection.clusters_per_step or training.batch_rows
    if groups > training.batch_rows:
        raise SlmError(
            f"projection.clusters_per_step {groups} is more than the {training.batch_rows} rows of a step "
            "(training.batch_rows): a group has one row at the least"
        )
    if training.batch_rows % groups:
        raise SlmError(
            f"training.batch_rows {training.batch_rows} is not a multiple of projection.clusters_per_step {groups}: "
            "the groups of a step have equally many rows"
        )
    if training.micro_rows and training.micro_rows % (training.batch_rows // groups):
        raise SlmError(
            f"training.micro_rows {training.micro_rows} is not a multiple of the {training.batch_rows // groups} rows "
            "of a group (training.batch_rows / projection.clusters_per_step)"
        )
    if init_from and projection.init != "anchored":
        raise SlmError("--init-from starts all experts of a network as that model: it needs projection.init=anchored")


def plain_job(
    ground: Ground, path: Path, inputs: dict, streams: list[Stream], distribution: np.ndarray, steps: int, **more
) -> Job:
    """One transformer on rows that are drawn from a distribution over streams."""
    shape, training = ground.shape, ground.config.training
    micro_rows, again = rows_that_fit(shape, training.batch_rows, training.micro_rows, training.checkpoint_layers)
    model = Transformer(shape, again)
    return Job(
        path,
        inputs,
        ground.start,
        partial(TrainingStep, model, AdamW.of(training), micro_rows),
        Sampler(streams, distribution, training.batch_rows, training.seed),
        steps,
        **{"evaluate": validation_loss(model, ground.valid, ground.windows)} | more,
        num_parameters=shape.num_parameters,
        flops_per_token=shape.flops_per_token,
    )


def generic_job(ground: Ground, path: Path, method: str) -> Job:
    """SLM and LLM."""
    stream = Stream(ground.store)
    return plain_job(
        ground, path, ground.inputs(method), [stream], np.ones(1), ground.steps(stream.num_rows, ground.tokens)
    )


def sampled_job(ground: Ground, path: Path, target: Target, report: Report) -> Job:
    """SLM-is."""
    workspace, config = ground.workspace, ground.config
    clusters = clusters_for(workspace, config, target, report)
    streams = clusters.assigned(config.data.generic, "train").streams(ground.store)
    steps = ground.steps(sum(stream.num_rows for stream in streams), ground.tokens)
    aim = importance_of(workspace, config, target, clusters, streams, steps * config.training.batch_rows)
    inputs = ground.inputs("is") | {"importance": inputs_of(config, target, clusters, aim)}
    files = {IMPORTANCE: aim.facts | {"distribution": aim.distribution.tolist()}}
    return plain_job(ground, path, inputs, streams, aim.distribution, steps, lines=aim.lines, files=files)


def generic_clusters(ground: Ground, k: int, report: Report) -> Clusters:
    """The clusters of the generic set that experts are trained on, its held-out split assigned too."""
    config = as_made(ground.workspace, ground.config, k, report)
    return ensure_clusters(ground.workspace, config, [k], [], report, splits=("train", "valid"))[0]


def experts_inputs(ground: Ground, method: str, clusters: Clusters) -> dict:
    """Inputs of a run with an expert per cluster; `generic` is the tokens of each cluster."""
    tokens = clusters.assigned(ground.config.data.generic, "train").tokens.tolist()
    return ground.inputs(method) | {"k": clusters.k, "clusters": clusters.fingerprint, "generic": tokens}


def network_job(ground: Ground, path: Path, report: Report) -> Job:
    """SLM-pn: clusters drawn by P(c | generic), several a step. The ground's projection is `resolved`."""
    training, projection, generic = ground.config.training, ground.config.projection, ground.config.data.generic
    shape = ProjectedShape.of(projection, ground.shape)
    groups = projection.clusters_per_step
    rows = training.batch_rows // groups
    given = training.micro_rows and training.micro_rows // rows
    micro, again = groups_that_fit(shape, groups, rows, given, training.checkpoint_layers)
    clusters = generic_clusters(ground, projection.k, report)
    assigned = clusters.assigned(generic, "train")
    streams = assigned.streams(ground.store)
    sampler = Sampler(streams, assigned.tokens, training.batch_rows, training.seed, rows)

    def parameters() -> dict:
        return initialise_network(shape, projection, training.seed, ground.start())

    rate = projection.tensor_rate or tensor_rate(parameters())
    model = Transformer(ground.shape, again)
    step = partial(ProjectedStep, model, AdamW.of(training), micro, tensor_rate=rate)
    place = clusters.assigned(generic, "valid").clusters[:][ground.windows]
    return Job(
        path,
        experts_inputs(ground, "pn", clusters) | {"projection": projection.model_dump(mode="json")},
        parameters,
        lambda p, m: step(parameters=p, moments=m),
        sampler,
        ground.steps(sampler.num_rows, ground.tokens),
        routed_loss(model, lambda p, c: expert(network_of(p), c), ground.valid, ground.windows, place),
        shape.num_parameters,
        shape.flops_per_token(rows * ground.shape.context_length),
        f"{shape.k} experts of {ground.shape.num_parameters:,} parameters each, from h = {shape.h} tensors of "
        f"{len(shape.matrices)} matrices; {groups} clusters a step; T learns at {rate:.2f} times the rate",
    )


def expert_jobs(ground: Ground, run: Path, clusters: Clusters, inputs: dict, experts: list[int]) -> dict[int, Job]:
    """Experts of SLM-mix: all mass on one cluster each, validated on the held-out windows of that cluster."""
    generic = ground.config.data.generic
    streams = clusters.assigned(generic, "train").streams(ground.store)
    places = clusters.assigned(generic, "valid").clusters[:][ground.windows]
    share = max(1, ground.tokens // clusters.k) if ground.tokens else None
    tokens = ground.config.mixture.tokens or share

    def job(expert: int) -> Job:
        own = ground.windows[places == expert]
        return plain_job(
            ground,
            expert_path(run, expert),
            inputs | {"expert": expert},
            [streams[expert]],
            np.ones(1),
            ground.steps(streams[expert].num_rows, tokens),
            evaluate=validation_loss(Transformer(ground.shape), ground.valid, own if len(own) else ground.windows),
        )

    return {expert: job(expert) for expert in experts}

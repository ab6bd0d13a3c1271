"""SLM-pn (section 2.5): k experts from h shared tensors; clusters drawn by P(c | generic), several in a step."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mlx_slm.config.schema import Config, ProjectionConfig, TrainingConfig
from mlx_slm.errors import SlmError
from mlx_slm.experts.experts import SELECTS
from mlx_slm.machine.ranks import ranks
from mlx_slm.methods.base import Method, Models, Rates, Rows, Setup, TrainingJob, Trains
from mlx_slm.methods.experts import experts_inputs, generic_clusters
from mlx_slm.methods.requests import Pretraining
from mlx_slm.models.projected import ProjectedShape, expert, initialise_network, network_of, tensor_rate
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer
from mlx_slm.project import Project
from mlx_slm.text.rows import Sampler, SoupSampler
from mlx_slm.training.optimizer import AdamW
from mlx_slm.training.projected_step import ProjectedStep, groups_that_fit, network_bytes, resolved, resolved_groups
from mlx_slm.training.runs import RECORD, Run, read_run
from mlx_slm.training.scoring import routed_loss


class ProjectedNetwork(Method):
    name, label, color = "pn", "SLM-pn", "C2"
    summary = "projected network"
    trains, rows, section = Trains.NETWORK, Rows.CLUSTER, "projection"
    one_model = False
    selects = ("histogram", *(select for select in SELECTS if select != "histogram"))
    paper_perplexity = (16.95, 14.29, 11.74)

    def check(self, project: Project, request: Pretraining) -> None:
        super().check(project, request)
        check_groups(project.config)
        if request.init_from and project.config.projection.init != "anchored":
            raise SlmError(
                "--init-from starts all experts of a network as that model: it needs projection.init=anchored"
            )

    def configured(self, project: Project, shape: Shape, path: Path, fresh: bool) -> tuple[Config, float]:
        config = project.config
        projected = ProjectedShape.of(config.projection, shape)
        begun = _as_begun(path, config.projection, config.training, fresh)
        projection = resolved(begun, config.training, projected)
        per_group = config.training.batch_rows * shape.context_length / resolved_groups(projection)
        slowdown = projected.flops_per_token(per_group) / shape.flops_per_token
        return config.model_copy(update={"projection": projection}), slowdown

    def pretrain(self, setup: Setup, request: Pretraining) -> Run:
        groups = resolved_groups(setup.project.config.projection)
        if groups % ranks().size:
            raise SlmError(
                f"{ranks().size} ranks cannot share the {groups} groups of a step: set projection.clusters_per_step "
                "to a multiple of their number, or start fewer"
            )
        return super().pretrain(setup, request)

    def job(self, setup: Setup, request: Pretraining) -> TrainingJob:
        config = setup.project.config
        training, projection, generic = config.training, config.projection, config.data.generic
        shape = ProjectedShape.of(projection, setup.shape)
        groups = resolved_groups(projection)
        rows = training.batch_rows // groups
        given = training.micro_rows and training.micro_rows // rows
        micro, recompute = groups_that_fit(shape, groups, rows, given, training.recompute_layers)
        clusters = generic_clusters(setup, projection.k)
        assigned = clusters.assigned(generic, "train")
        drawn = (assigned.streams(setup.store), assigned.tokens, training.batch_rows, training.seed, rows)
        sampler = SoupSampler(*drawn, soup=projection.soup) if projection.soup else Sampler(*drawn)

        def parameters() -> dict:
            return initialise_network(shape, projection, training.seed, setup.start())

        rate = projection.tensor_rate or tensor_rate(parameters())
        model = Transformer(setup.shape, recompute)
        step = partial(ProjectedStep, model, AdamW.of(training), micro, tensor_rate=rate)
        place = clusters.assigned(generic, "valid").clusters[:][setup.windows]
        return TrainingJob(
            setup.path,
            experts_inputs(setup, self.name, clusters) | {"projection": projection.recorded()},
            parameters,
            lambda p, m: step(parameters=p, moments=m),
            sampler,
            setup.steps(sampler.num_rows, setup.tokens),
            routed_loss(model, lambda p, c: expert(network_of(p), c), setup.valid, setup.windows, place),
            shape.num_parameters,
            shape.flops_per_token(rows * setup.shape.context_length),
            f"{shape.k} experts of {setup.shape.num_parameters:,} parameters each, from h = {shape.h} tensors of "
            f"{len(shape.matrices)} matrices; {groups} clusters a step; T learns at {rate:.2f} times the rate",
            published=setup.published,
        )

    def flops_per_token(self, models: Models) -> float:
        return models.network.flops_per_token(models.tokens_per_group)

    def rate(self, rates: Rates) -> float:
        return rates.pn

    def memory(self, models: Models) -> float:
        training, groups = models.config.training, models.groups
        rows = max(1, training.batch_rows // groups)
        return network_bytes(models.network, groups, rows, 1, training.recompute_layers is not False)

    def check_study(self, config: Config) -> None:
        check_groups(config)
        ProjectedShape.of(config.projection, Shape.of(config.model, config.tokenizer.vocab_size, 1))


def check_groups(config: Config) -> None:
    """Raise SlmError for groups that a step's rows cannot be divided into."""
    training, projection = config.training, config.projection
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


def _as_begun(path: Path, projection: ProjectionConfig, training: TrainingConfig, fresh: bool) -> ProjectionConfig:
    """The section with the clusters of a step that the run began with, perhaps by the memory of another machine."""
    if projection.clusters_per_step or fresh or not (path / RECORD).exists():
        return projection
    inputs = read_run(path)["inputs"]
    if "projection" not in inputs or inputs["training"]["batch_rows"] != training.batch_rows:
        return projection  # of other settings, for which the run is refused later
    return projection.model_copy(update={"clusters_per_step": inputs["projection"]["clusters_per_step"]})

"""SLM-is (section 2.4): a small model on the generic set resampled to have a domain's histogram over clusters."""

from __future__ import annotations

from mlx_slm.clustering.target import SamplingTarget, check_target, clusters_for, importance_of, inputs_of
from mlx_slm.errors import SlmError
from mlx_slm.methods.base import Cost, Method, Rows, Setup, TrainingJob
from mlx_slm.methods.costs import Spending
from mlx_slm.methods.requests import Pretraining
from mlx_slm.methods.work import plain_job
from mlx_slm.project import Project
from mlx_slm.training.runs import IMPORTANCE


class ImportanceSampling(Method):
    name, label, color = "is", "SLM-is", "C1"
    summary = "small model with importance sampling"
    rows, section = Rows.DOMAIN, "clusters"
    pool = 4
    """Some clusters are drawn often."""

    def run_name(self, request: Pretraining) -> str:
        return f"{self.name}-{_target(request).label}"

    def check(self, project: Project, request: Pretraining) -> None:
        super().check(project, request)
        check_target(project, _target(request))

    def job(self, setup: Setup, request: Pretraining) -> TrainingJob:
        project, config, target = setup.project, setup.project.config, _target(request)
        clusters = clusters_for(project, target)
        streams = clusters.assigned(config.data.generic, "train").streams(setup.store)
        steps = setup.steps(sum(stream.num_rows for stream in streams), setup.tokens)
        aim = importance_of(project, target, clusters, streams, steps * config.training.batch_rows)
        inputs = setup.inputs(self.name) | {"importance": inputs_of(config, target, clusters, aim)}
        files = {IMPORTANCE: aim.facts | {"distribution": aim.distribution.tolist()}}
        return plain_job(setup, inputs, streams, aim.distribution, lines=aim.lines, files=files)

    def cost(self, spending: Spending) -> Cost:
        return Cost(0.0, spending.sampling_hours + super().cost(spending).specialization)


def _target(request: Pretraining) -> SamplingTarget:
    if request.target is None:
        raise SlmError(f"method {request.method} needs what to sample for: a domain, or weights of the clusters")
    return request.target

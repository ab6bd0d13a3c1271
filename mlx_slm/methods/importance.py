"""SLM-is (section 2.4): a small model on the generic set resampled to have a domain's histogram over clusters."""

from __future__ import annotations

from mlx_slm.clustering.target import SamplingTarget, check_target, clusters_for, importance_of, inputs_of
from mlx_slm.errors import SlmError
from mlx_slm.methods.base import Cost, Method, Rows, Setup, TrainingJob
from mlx_slm.methods.costs import Spending
from mlx_slm.methods.mixing import domain_stream, mixed, mixes, mixing_of
from mlx_slm.methods.plain import Small
from mlx_slm.methods.requests import Pretraining
from mlx_slm.methods.work import plain_job
from mlx_slm.project import Project
from mlx_slm.text.rows import Phase
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
        own = domain_stream(project, target) if mixes(config, target) else None
        mixing = mixing_of(config, steps, own.num_rows if own else 0)
        rows = steps * config.training.batch_rows
        aim = importance_of(project, target, clusters, streams, max(1, round(rows * (1 - mixing.mean))))
        inputs = setup.inputs(self.name) | {"importance": inputs_of(config, target, clusters, aim) | mixing.inputs}
        facts = aim.facts | {"distribution": aim.distribution.tolist()}
        if own is None:
            return plain_job(setup, inputs, streams, aim.distribution, lines=aim.lines, files={IMPORTANCE: facts})
        facts |= {"domain_share": mixing.mean, "domain_passes": rows * mixing.mean / own.num_rows}
        first, *later = (Phase(begin, mixed(aim.distribution, share)) for begin, share in mixing.phases)
        return plain_job(
            setup,
            inputs,
            [*streams, own],
            first.distribution,
            lines=f"{aim.lines}\n  {'the domain itself':<24}{mixing.mean:.1%} of the rows, "
            f"{facts['domain_passes']:.1f} passes over it",
            files={IMPORTANCE: facts},
            steps=steps,
            later=tuple(later),
            reads=(target.domain or "",),
        )

    def cost(self, spending: Spending) -> Cost:
        return Cost(0.0, spending.sampling_hours + super().cost(spending).specialization)


class Continued(ImportanceSampling):
    """A generic small model that goes on with importance sampling: it is paid for once, and each domain for little.

    With as many tokens in all as SLM-is it ends near that (docs/results.md has by how much). It is not of the paper.
    """

    OWN = 0.25
    """Of the hours of a domain's SLM-is, what a plan gives to going on; the rest is for the generic model."""
    name, label, color = "cis", "SLM-cis", "C9"
    summary = "small model that goes on with importance sampling"
    continues, other_budget = Small.name, "shared_budget"

    def check(self, project: Project, request: Pretraining) -> None:
        super().check(project, request)
        if request.init_from is None:
            raise SlmError(f"method {self.name} goes on from a model: name it with --init-from, such as slm")

    def cost(self, spending: Spending) -> Cost:
        hours = spending.sampling_hours
        return Cost((1 - self.OWN) * hours, self.OWN * hours + Method.cost(self, spending).specialization)

    def pretrained(self, budget: int | None, other_budget: int | None) -> dict[str, int]:
        return super().pretrained(budget, other_budget) | {Small.name: other_budget or 0}


def _target(request: Pretraining) -> SamplingTarget:
    if request.target is None:
        raise SlmError(f"method {request.method} needs what to sample for: a domain, or weights of the clusters")
    return request.target

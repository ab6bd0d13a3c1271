"""SLM-is (section 2.4): a small model on the generic set resampled to have a domain's histogram over clusters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_slm.clustering.target import SamplingTarget, check_target, clusters_for, importance_of, inputs_of
from mlx_slm.config.schema import Config
from mlx_slm.errors import SlmError
from mlx_slm.methods.base import Cost, Method, Rows, Setup, TrainingJob
from mlx_slm.methods.costs import Spending
from mlx_slm.methods.plain import Small
from mlx_slm.methods.requests import Pretraining
from mlx_slm.methods.work import cooldown_steps, plain_job
from mlx_slm.project import Project
from mlx_slm.text.rows import Phase, Stream
from mlx_slm.text.store import Store, first_windows
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
        mixing = mixing_of(config, target, steps)
        rows = steps * config.training.batch_rows
        aim = importance_of(project, target, clusters, streams, round(rows * (1 - mixing.mean)))
        inputs = setup.inputs(self.name) | {"importance": inputs_of(config, target, clusters, aim) | mixing.inputs}
        facts = aim.facts | {"distribution": aim.distribution.tolist()}
        if not mixing.mean:
            return plain_job(setup, inputs, streams, aim.distribution, lines=aim.lines, files={IMPORTANCE: facts})
        own = domain_stream(project, target)
        passes = rows * mixing.mean / own.num_rows
        facts |= {"domain_share": mixing.mean, "domain_passes": passes}
        lines = f"{aim.lines}\n  {'the domain itself':<24}{mixing.mean:.1%} of the rows, {passes:.1f} passes over it"
        first, *later = (Phase(begin, mixed(aim.distribution, share)) for begin, share in mixing.phases)
        return plain_job(
            setup,
            inputs,
            [*streams, own],
            first.distribution,
            lines=lines,
            files={IMPORTANCE: facts},
            steps=steps,
            later=tuple(later),
        )

    def cost(self, spending: Spending) -> Cost:
        return Cost(0.0, spending.sampling_hours + super().cost(spending).specialization)


class Continued(ImportanceSampling):
    """A generic small model that goes on with importance sampling: it is paid for once, and each domain for little.

    With as many tokens in all as SLM-is it ends where that does (docs/decisions.md). It is not of the paper.
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


@dataclass(frozen=True)
class Mixing:
    """The share of the rows that are the domain's own text."""

    phases: list[tuple[int, float]]
    """(first step, share)."""
    mean: float
    """Over the horizon."""
    inputs: dict
    """For the record; empty where there is none, as in records of before."""


def mixing_of(config: Config, target: SamplingTarget, steps: int) -> Mixing:
    """What `clusters.domain_share` and `clusters.cooldown_share` ask for; raises SlmError where there is no domain."""
    share, falling = config.clusters.domain_share, cooldown_steps(config.training, steps)
    last = config.clusters.cooldown_share
    if last is not None and not falling:
        raise SlmError(
            f"clusters.cooldown_share={last:g} is for the last steps, in which the rate falls, and of {steps:,} steps "
            f"training.cooldown={config.training.cooldown:g} leaves none: raise it, or leave cooldown_share out"
        )
    last = share if last is None else last
    if not share and not last:
        return Mixing([(0, 0.0)], 0.0, {})
    if target.domain is None:
        raise SlmError("clusters.domain_share mixes the domain's text in, and --weights names no domain: set it to 0")
    phases = [(0, share)] if last == share else [(0, share), (steps - falling, last)]
    mean = share + (last - share) * falling / steps
    rows = steps * config.training.batch_rows
    if mean * rows < 1:
        raise SlmError(
            f"clusters.domain_share={share:g}: of {rows:,} rows that is none: raise it, train longer, or set it to 0"
        )
    return Mixing(phases, mean, {"domain_share": share, "cooldown_share": last})


def mixed(distribution: np.ndarray, share: float) -> np.ndarray:
    """A distribution over clusters with the domain's own stream behind them."""
    return np.append((1 - share) * distribution, share)


def domain_stream(project: Project, target: SamplingTarget) -> Stream:
    """The rows of the domain set itself; raises SlmError where it is smaller than one."""
    store = Store(project.workspace.require_set(target.domain or "", "train"))
    own = Stream.of(store, first_windows(store, target.tokens, project.config.data.seed))
    if own.length < own.row_length:
        raise SlmError(
            f"{target.domain} has {own.length:,} tokens to train on, a row {own.row_length:,}: give more text, or set "
            "clusters.domain_share=0"
        )
    return own


def _target(request: Pretraining) -> SamplingTarget:
    if request.target is None:
        raise SlmError(f"method {request.method} needs what to sample for: a domain, or weights of the clusters")
    return request.target

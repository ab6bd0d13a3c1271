"""Early mixing: rows of the domain's own text in its pretraining, beside those of the clusters (arXiv 2603.16177)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_slm.clustering.target import SamplingTarget
from mlx_slm.config.schema import Config
from mlx_slm.errors import SlmError
from mlx_slm.methods.work import cooldown_steps
from mlx_slm.project import Project
from mlx_slm.text.rows import Stream
from mlx_slm.text.store import Store, first_windows


@dataclass(frozen=True)
class Mixing:
    """The share of the rows that are the domain's own text."""

    phases: list[tuple[int, float]]
    """(first step, share)."""
    mean: float
    """Over the horizon."""
    inputs: dict
    """For the record; empty where there is none, as in records of before."""


def mixes(config: Config, target: SamplingTarget) -> bool:
    """Whether the domain's text is among the rows: given weights are of no domain."""
    return target.domain is not None and bool(config.clusters.domain_share or config.clusters.cooldown_share)


def mixing_of(config: Config, steps: int, domain_rows: int) -> Mixing:
    """What the section `clusters` asks for, over a horizon of `steps`, of a domain of so many rows (0: none is mixed).

    Shares that would read the domain more often than `domain_passes` are lowered together. Raises SlmError for phases
    that leave no rows.
    """
    settings, falling, rows = (
        config.clusters,
        cooldown_steps(config.training, steps),
        steps * config.training.batch_rows,
    )
    share, last = settings.domain_share, settings.cooldown_share
    if not domain_rows:
        return Mixing([(0, 0.0)], 0.0, {})
    if last is not None and not falling:
        raise SlmError(
            f"clusters.cooldown_share={last:g} is for the last steps, in which the rate falls, and of {steps:,} steps "
            f"training.cooldown={config.training.cooldown:g} leaves none: raise it, or leave cooldown_share out"
        )
    last = share if last is None else last
    mean = share + (last - share) * falling / steps
    if not mean:
        return Mixing([(0, 0.0)], 0.0, {})
    given = f"clusters.domain_share={share:g}" if share else f"clusters.cooldown_share={last:g}"
    if mean * rows < 1:
        raise SlmError(f"{given}: of {rows:,} rows that is none: raise it, train longer, or set it to 0")
    lowered = min(1.0, settings.domain_passes * domain_rows / (mean * rows))
    share, last = lowered * share, lowered * last
    if (1 - lowered * mean) * rows < 1:
        raise SlmError(f"{given}: of {rows:,} rows none is left for the generic set: lower it, or train longer")
    phases = [(0, share)] if last == share else [(0, share), (steps - falling, last)]
    return Mixing(phases, lowered * mean, {"domain_share": share, "cooldown_share": last})


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

"""Which expert a domain gets (sections 2.5 and 4.3, Table 5), before it is fine-tuned."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from mlx_slm.config.schema import Config
from mlx_slm.experts.experts import FREQUENT, HISTOGRAM, Experts
from mlx_slm.finetuning.domain import DomainSet
from mlx_slm.models.transformer import Transformer
from mlx_slm.project import Project
from mlx_slm.report import Report
from mlx_slm.text.store import Store, first_windows
from mlx_slm.training.scoring import Scorer, score_of


def select_expert(project: Project, experts: Experts, select: str, domain: DomainSet) -> dict:
    """The choice by `select` (all but `finetuned`) for a domain set, as a record:

    `{"select", "expert": int | None, "histogram": [k] | None, "share", "scores": {expert: nats per token} | None,
    "cost": {"tokens", "seconds"}}`, where the cost is that of the scoring. Raises SlmError if there is no such expert.
    """
    config, store, windows = project.config, domain.store, domain.windows
    shares = experts.histogram(config, domain.name, windows, project.report)
    begun = time.perf_counter()
    selection: dict = {"select": select, "expert": None, "histogram": None, "scores": None}
    tokens = 0
    if select == HISTOGRAM:
        selection["histogram"] = shares.tolist()
    elif select == FREQUENT:
        selection["expert"] = int(shares.argmax())
    else:
        sample = sample_of(config, domain)
        scores = score_experts(experts, store, sample, project.report)
        selection |= {"scores": scores, "expert": min(scores, key=lambda number: scores[number])}
        tokens = int(store.lengths(sample).sum()) * len(scores)
    selection["share"] = None if selection["expert"] is None else float(shares[selection["expert"]])
    return selection | {"cost": {"tokens": tokens, "seconds": round(time.perf_counter() - begun, 2)}}


def chosen(experts: Experts, selection: dict) -> dict:
    """Parameters of the expert that a record of `select_expert` names."""
    histogram = selection["histogram"]
    return experts.parameters(selection["expert"] if histogram is None else np.array(histogram))


def score_experts(experts: Experts, store: Store, windows: np.ndarray, report: Report) -> dict[int, float]:
    """Nats per token of every trained expert on the same windows; raises SlmError if there is none."""
    losses = each_expert(experts, lambda scorer: scorer.window_nll(store, windows), report)
    return {number: score_of(store, windows, nll).nll for number, nll in losses.items()}


def each_expert(experts: Experts, losses: Callable[[Scorer], np.ndarray], report: Report) -> dict[int, np.ndarray]:
    """What `losses` gives with the weights of every trained expert; raises SlmError if there is none."""
    model = Transformer(experts.run.shape)
    scorer, found = Scorer(model), {}
    with report.progress("scoring the experts", len(experts.trained), " experts") as advance:
        for number in experts.require_trained():
            model.update(experts.parameters(number))
            found[number] = losses(scorer)
            advance(1)
    return found


def sample_of(config: Config, domain: DomainSet) -> np.ndarray:
    """The windows of a domain set on which experts are scored: of its first `finetuning.select_tokens` tokens."""
    size = min(config.finetuning.select_tokens, domain.store.num_tokens)
    return domain.windows[np.isin(domain.windows, first_windows(domain.store, size, config.data.seed))]


def describe(selection: dict) -> str:
    """The choice in words."""
    if selection["expert"] is None:
        return "the experts combined by the domain's histogram"
    share = f", {selection['share']:.0%} of the domain" if selection["share"] is not None else ""
    return f"expert {selection['expert']} ({selection['select']}{share})"

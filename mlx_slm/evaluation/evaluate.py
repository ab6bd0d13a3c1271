"""Perplexity of models on held-out sets, and the record of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mlx_slm.errors import SlmError
from mlx_slm.experts.bundle import bundle_at, find_source, install_bundle
from mlx_slm.experts.experts import FREQUENT, HISTOGRAM, Experts, has_experts
from mlx_slm.export.model import KIND, check_model, find_model, load_any
from mlx_slm.models.transformer import Transformer
from mlx_slm.project import Project
from mlx_slm.report import Report, perplexity
from mlx_slm.storage.artifacts import load_manifest
from mlx_slm.storage.records import append_json
from mlx_slm.storage.workspace import EVALUATIONS, Workspace
from mlx_slm.text.hub_tokenizer import open_tokenizer
from mlx_slm.text.reread import Reread
from mlx_slm.text.store import Store, first_windows
from mlx_slm.text.tokenizer import Tokenizer
from mlx_slm.training.scoring import Score, Scorer, routed_nll, score_of

OWN = "own"
"""In a result: the model read the text by a tokenizer of its own. Bits a byte compare, perplexities do not."""


def macro_perplexity(scores: list[Score]) -> float:
    """exp of the mean over sets of nats per token, so that every set has the same weight (section 3)."""
    return perplexity(math.fsum(score.nll for score in scores) / len(scores))


def evaluate(
    project: Project,
    models: Sequence[str] = (),
    domains: Sequence[str] = (),
    split: str = "test",
    expert: str | None = None,
    tokens: int | None = None,
) -> dict:
    """Score models (default: all that are exported) on sets (default: all domains); keeps a record in results/.

    A run with experts reads each window through the expert of its cluster, or all through `expert`: its number,
    `frequent` or `histogram`, by the first `tokens` tokens of the set's train split (None: all), as `specialize` does.
    Returns `{"results": [...], "macro": [...]}`.
    """
    workspace, config, report = project.workspace, project.config, project.report
    models = models or list(dict.fromkeys([*workspace.models(), *workspace.adapters()]))
    sets = domains or [name for name in workspace.sets() if name != config.data.generic]
    if not models:
        raise SlmError(f"no model in {workspace.root} yet: `mlx-slm pretrain` or `mlx-slm specialize` makes one")
    experts = {name: find_experts(workspace, name, report) for name in models}
    if expert is not None and (single := next((name for name, own in experts.items() if own is None), None)):
        raise SlmError(f"--expert {expert}: {single} is a single model; it is for runs of the methods pn and mix")
    if not sets:
        raise SlmError("no domain is prepared: name a set with --domain, or run `mlx-slm prepare NAME SOURCE...`")
    stores = {name: Store(workspace.require_set(name, split)) for name in sets}
    for name in [name for name, store in stores.items() if not store.num_windows and not domains]:
        report.warn(f"{name} has no {split} split, so it is left out")
        del stores[name]
    workspace.results.mkdir(parents=True, exist_ok=True)
    results, macro = [], []
    for name in models:
        evaluated, scores = Evaluated(project, name, experts[name]), []
        for set_name in stores:
            score, how = evaluated.score(set_name, split, expert, tokens)
            scores.append(score)
            results.append(
                {"model": name, "set": set_name, "split": split, **asdict(score), **how, **evaluated.weights}
            )
            append_json(workspace.results / EVALUATIONS, results[-1])
        if scores:
            macro.append({"model": name, "sets": list(stores), "perplexity": macro_perplexity(scores)})
    return {"results": results, "macro": macro}


class Evaluated:
    """A model, or the experts of a run, ready to score sets."""

    def __init__(self, project: Project, name: str, experts: Experts | None):
        self.project, self.name, self.experts = project, name, experts
        if experts:
            self.model, self.tokenizer = Transformer(experts.run.shape), experts.run.record["inputs"]["tokenizer"]
        else:
            self.model, self.tokenizer = load_any(project.workspace, name)
        exported = None if experts else find_model(project.workspace, name)
        self.weights = {"weights": load_manifest(exported, KIND)["fingerprint"]} if exported else {}
        """Which weights those of an exported model are, for its card."""
        self.scorer = Scorer(self.model)

    def score(
        self,
        set_name: str,
        split: str,
        expert: str | None = None,
        domain_tokens: int | None = None,
        limit: int | None = None,
    ) -> tuple[Score, dict]:
        """(score on a split, how its windows were routed). `limit`: score on about this many tokens (None: all)."""
        store = Store(self.project.workspace.require_set(set_name, split))
        context, how = self.model.shape.context_length, dict[str, Any]()
        if isinstance(self.tokenizer, Tokenizer):
            ours = open_tokenizer(self.project.workspace.tokenizer)
            store.require_tokenizer(ours)
            store = Reread(store, ours, self.tokenizer, min(store.context_length, context))
            how["tokenizer"] = OWN
        else:
            store.require_fit(self.name, context, self.tokenizer, shorter=True)
        windows = np.arange(store.num_windows)
        if limit and limit < store.num_tokens:
            windows = first_windows(store, limit, self.project.config.data.seed)
        experts = self.experts
        if experts and expert is None:
            place = experts.assigned(self.project.config, set_name, split, self.project.report).clusters[:][windows]
            nll = routed_nll(self.scorer, experts.parameters, store, windows, place, self.project.report)
            return score_of(store, windows, nll), {"routing": "cluster"}
        if experts and expert is not None:
            which, how = _one_expert(self.project, experts, set_name, expert, domain_tokens)
            self.model.update(experts.parameters(which))
        return self.scorer(store, windows, report=self.project.report), how


def find_experts(workspace: Workspace, name: str, report: Report) -> Experts | None:
    """The experts of a run, or of a bundle whose parts are taken into the workspace; None for a single model.

    Raises SlmError for an unknown name.
    """
    if bundle := bundle_at(workspace, name):
        install_bundle(workspace, bundle, report)
    else:
        check_model(workspace, name)
        if find_model(workspace, name) or name.partition("@")[0] not in workspace.runs():
            return None
    run = find_source(workspace, name)
    return Experts(workspace, run) if has_experts(run) else None


def _one_expert(
    project: Project, experts: Experts, set_name: str, expert: str, tokens: int | None
) -> tuple[int | np.ndarray, dict]:
    """(the expert that scores all of a set, how it is named in the results)."""
    if expert.isascii() and expert.isdecimal():
        return int(expert), {"routing": "expert", "expert": int(expert)}
    if expert not in (FREQUENT, HISTOGRAM):
        raise SlmError(f"--expert {expert}: give the number of an expert, {FREQUENT} or {HISTOGRAM}")
    train = Store(experts.workspace.require_set(set_name, "train"))
    windows = first_windows(train, tokens, project.config.data.seed)
    shares = experts.histogram(project.config, set_name, windows, project.report)
    if expert == HISTOGRAM:
        return shares, {"routing": HISTOGRAM}
    return int(shares.argmax()), {"routing": FREQUENT, "expert": int(shares.argmax())}

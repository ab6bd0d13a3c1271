"""One cell of a study: pretrain what it starts from, specialise, score before and after, and what all that cost."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property

from mlx_slm.clustering.clusters import Clusters, as_made, ensure_clusters
from mlx_slm.clustering.show import summary
from mlx_slm.clustering.target import SamplingTarget
from mlx_slm.config.files import changed_config
from mlx_slm.config.schema import HORIZONS, Config
from mlx_slm.errors import OtherSettings, SlmError
from mlx_slm.evaluation.evaluate import Evaluated, find_experts
from mlx_slm.experts.experts import HISTOGRAM
from mlx_slm.export.model import require_model
from mlx_slm.fields import format_size
from mlx_slm.machine import runtime
from mlx_slm.methods import find_method
from mlx_slm.methods.requests import SCRATCH, Pretraining, Specialisation
from mlx_slm.project import Project
from mlx_slm.report import perplexity
from mlx_slm.stages.pretrain import pretrain
from mlx_slm.stages.specialize import name_of_teacher, specialize
from mlx_slm.storage import formats
from mlx_slm.storage.records import fingerprint, read_json_lines
from mlx_slm.storage.workspace import EVALUATIONS, Workspace, plain_name
from mlx_slm.study.grid import Cell, budgets_of, cells
from mlx_slm.text.prepare import ensure_set, text_needed
from mlx_slm.text.sources import SPLITS
from mlx_slm.text.store import Store, first_windows
from mlx_slm.training.find import find_run
from mlx_slm.training.runs import Run, alone_in
from mlx_slm.training.scoring import validation_windows


class Study:
    """The grid of a configuration in a workspace; the names of its runs contain `<name>-`."""

    def __init__(self, project: Project, name: str):
        self.workspace, self.config, self.report, self.name = project.workspace, project.config, project.report, name
        self.cells = cells(project.config)
        self.budgets = budgets_of(self.cells)
        self.file = project.workspace.results / f"{name}.jsonl"
        self._scores: dict[tuple, dict] = {}

    @property
    def project(self) -> Project:
        return Project(self.workspace, self.config, self.report)

    def prepare(self) -> None:
        """Prepare and cluster what was not; raises SlmError, before any training, for cells that cannot be done."""
        config = self.config
        sizes: dict[str, int] = {}
        for cell in self.cells:
            sizes[cell.domain] = max(cell.domain_tokens, sizes.get(cell.domain, 0))
        self._check(sizes)
        read = (budget * find_method(method).pool for cell in self.cells for method, budget in cell.pretrained.items())
        most = max(read, default=0)
        ensure_set(self.project, config.data.generic, text_needed(most))
        for domain, size in sizes.items():
            ensure_set(self.project, domain, text_needed(size))
            first_windows(Store(self.workspace.require_set(domain)), size, config.data.seed)
            self._check_held_out(domain)
        for k in sorted({cell.k for cell in self.cells if cell.k}):
            ensure_clusters(as_made(self.project, k), [k], list(sizes), splits=("train", "valid"))

    def _check(self, domains: Iterable[str]) -> None:
        config = self.config
        for name in (self.name, *(cell.name for cell in self.cells)):
            plain_name(name)
        if self.file.name == EVALUATIONS:
            raise SlmError(f"a study cannot be called {self.name}: `evaluate` keeps its results there; rename its file")
        if config.data.generic in domains:
            raise SlmError(f"study.grids: {config.data.generic} is the generic set, not a domain")
        named = {(cell.variant, cell.changes) for cell in self.cells}
        if twice := [name for name, count in Counter(name for name, _ in named).items() if count > 1]:
            raise SlmError(f"study.grids: variant {twice[0]} stands for several settings: give each its own name")
        for cell in {(cell.method, cell.k, cell.variant): cell for cell in self.cells}.values():
            tuned = [key for key, _ in cell.changes if key.startswith("finetuning.")]
            if tuned and find_method(cell.method).other_budget == "teacher_budget":
                raise SlmError(
                    f"study.grids: variant {cell.variant} changes {tuned[0]}, and the teachers of method {cell.method} "
                    "are fine-tuned with the study's own settings: leave that method out of it"
                )
            find_method(cell.method).check_study(self._config(cell, next(iter(cell.pretrained), None)))
        if config.training.schedule != "constant" and any(len(budgets) > 1 for budgets in self.budgets.values()):
            self.report.warn(
                f"training.schedule is {config.training.schedule}, so of a run's budgets only the largest is that "
                "of a finished training: set training.schedule=constant to compare them"
            )

    def _check_held_out(self, domain: str) -> None:
        config = self.config
        validation_windows(Store(self.workspace.data(domain, "valid")), config.finetuning.eval_tokens, config.data.seed)
        if not Store(self.workspace.data(domain, "test")).num_windows:
            raise SlmError(f"set {domain} has no test split: prepare it with one (test=PATH, or data.test_fraction)")

    @cached_property
    def settings(self) -> dict[str, str]:
        """What each cell's row depends on: settings, horizons and the text; a row of others is made again."""
        settings = {}
        for cell in self.cells:
            horizons = {method: self.budgets[cell.trunk(method)][-1] for method in cell.pretrained}
            changes = [cell.changes] if cell.changes else []
            own = find_method(cell.method).of_study(self.config)
            settings[cell.name] = fingerprint([self._of_all, horizons, own, *changes, self._texts[cell.domain]])
        return settings

    @cached_property
    def _of_all(self) -> list:
        settings = formats.renamed(self.config.all_recorded({"study"}), back=True)
        return [settings, self.config.study.test_tokens, self._text_of(self.config.data.generic)]

    @cached_property
    def _texts(self) -> dict[str, list[str]]:
        return {domain: self._text_of(domain) for domain in {cell.domain for cell in self.cells}}

    def _text_of(self, name: str) -> list[str]:
        return [Store(self.workspace.require_set(name, split)).fingerprint for split in SPLITS]

    def histograms(self) -> list[dict]:
        """How the generic set and the domains lie over each number of clusters (`clustering.show.summary`)."""
        domains = list(dict.fromkeys(cell.domain for cell in self.cells))
        counts = sorted({cell.k for cell in self.cells if cell.k})
        return [summary(Clusters(self.workspace, k), self.config.data.generic, domains) for k in counts]

    def work(self, cell: Cell) -> dict:
        """Do a cell; returns its row. Raises Busy where another process trains a run that it needs."""
        try:
            return self._work(cell)
        except OtherSettings as error:
            raise SlmError(
                f"{error.what}: put it back, give the study's file another name, or remove that run from "
                f"{self.workspace.root / 'runs'}, to have it trained again"
            ) from error

    def _work(self, cell: Cell) -> dict:
        bases: dict[str, tuple[Run, int | None]] = {}
        for name, budget in reversed(cell.pretrained.items()):
            bases[name] = (self._pretrained(cell, name, bases), budget if find_method(name).milestones else None)
        starts = [_called(*bases[name]) for name in cell.pretrained]
        costs = {name: _cost_at(*base) for name, base in bases.items()}
        name = f"{self.name}-{cell.name}"
        method = find_method(cell.method)
        if method.teaches and not cell.changes:
            name = name_of_teacher(find_run(self.workspace, starts[0]), cell.domain, cell.domain_tokens)
        start = starts[0] if starts else SCRATCH
        request = Specialisation(cell.domain, start, cell.domain_tokens, name, select=cell.select)
        request = dataclasses.replace(request, **method.specialisation(self.config, starts))
        tuned = specialize(Project(self.workspace, self._config(cell), self.report), request)
        generic = before = None
        if starts:
            generic = self._score(starts[0], self.config.data.generic, "valid", self.config.training.eval_tokens)
            before = self._score(starts[0], cell.domain, "test", None, _expert(tuned), cell.domain_tokens)
        return {
            "cell": cell.name,
            "settings": self.settings[cell.name],
            "device": runtime.device_name(),
            **asdict(cell),
            "generic": generic,
            "pretrained": before,
            "specialized": self._score(tuned.name, cell.domain, "test"),
            "pretraining": _sum(list(costs.values())),
            "shared": _sum([cost for name, cost in costs.items() if not find_method(name).is_per_domain]),
            "specialization": _specialization_cost(self.workspace, tuned),
            "curve": _curve(tuned),
            "selection": tuned.record.get("selection"),
            "importance": _importance(bases[cell.method][0]) if cell.method in bases else None,
        }

    def _config(self, cell: Cell, method: str | None = None) -> Config:
        """The configuration for a cell, and for the pretraining of `method`: one long run with the budgets as its
        milestones."""
        config, seed = self.config, {"seed": cell.seed}
        if cell.changes:
            config = changed_config(config, dict(cell.changes), f"study.grids, variant {cell.variant}")
        changes: dict = {"finetuning": config.finetuning.model_copy(update=seed)}
        horizon: dict = {}
        if method:
            budgets = self.budgets[cell.trunk(method)]
            horizon = dict.fromkeys(HORIZONS) | {"tokens": budgets[-1]}
            horizon["milestones"] = budgets if find_method(method).milestones else []
        changes["training"] = config.training.model_copy(update=seed | horizon)
        if section := find_method(cell.method).section:
            k = {"k": cell.k} | ({"tokens": None} if section == "mixture" else {})
            changes[section] = getattr(config, section).model_copy(update=k)
        return config.model_copy(update=changes)

    def _pretrained(self, cell: Cell, method: str, others: dict[str, tuple[Run, int | None]]) -> Run:
        """The run of `method` that a cell needs, trained where it was not; `others`: those that it may go on from."""
        of, config, name = find_method(method), self._config(cell, method), f"{self.name}-{cell.trunk(method)}"
        target = SamplingTarget(cell.domain, cell.domain_tokens) if of.is_per_domain else None
        with alone_in(self.workspace.run(name)):
            pass  # Busy now, rather than after a network was initialised
        start = None
        if of.continues:
            shared, budget = others[of.continues]
            with alone_in(shared.path):
                start = require_model(self.workspace, _called(shared, budget))
        request = Pretraining(method, name, target=target, init_from=start)
        run = pretrain(Project(self.workspace, config, self.report), request)
        budget = cell.pretrained[method]
        if of.milestones and run.step_at(budget) not in run.kept_steps():
            raise SlmError(
                f"run {name} was finished without a checkpoint at {format_size(budget)} tokens: take a budget that it "
                f"has (steps {', '.join(map(str, run.kept_steps()))}), or remove it from {run.path.parent}"
            )
        return run

    def _score(
        self,
        model: str,
        name: str,
        split: str,
        limit: int | None = None,
        expert: str | None = None,
        domain_tokens: int | None = None,
    ) -> dict:
        """A model's score on a set, worked out once. `limit`: default `study.test_tokens`."""
        key = (model, name, split, expert, domain_tokens if expert == HISTOGRAM else None)
        if key not in self._scores:
            evaluated = Evaluated(self.project, model, find_experts(self.workspace, model, self.report))
            score, _ = evaluated.score(name, split, expert, domain_tokens, limit or self.config.study.test_tokens)
            kept = ("nll", "stderr", "perplexity", "bits_per_byte", "tokens")
            self._scores[key] = {field: asdict(score)[field] for field in kept}
        return self._scores[key]


def _expert(tuned: Run) -> str | None:
    """How `evaluate` names the expert that a run was specialised from."""
    selection = tuned.record.get("selection")
    if selection is None:
        return None
    return HISTOGRAM if selection["expert"] is None else str(selection["expert"])


def _called(run: Run, budget: int | None) -> str:
    """A run at its milestone."""
    return f"{run.name}@{budget}" if budget else run.name


COSTS = ("tokens", "seconds", "flops")


def _sum(costs: list[dict]) -> dict:
    return {key: sum(cost[key] for cost in costs) for key in COSTS}


def _cost_at(run: Run, budget: int | None) -> dict:
    """What a pretraining cost up to its milestone at `budget` tokens (None: all of it): its share of the steps."""
    record = run.record
    step = run.step_at(budget) if budget else record["step"]
    return {key: record[key] * step / record["step"] for key in COSTS}


def _specialization_cost(workspace: Workspace, tuned: Run) -> dict:
    """What a fine-tuning cost, with the choice of its expert and the fine-tuning of its teacher."""
    record = tuned.record
    cost = {key: record[key] for key in COSTS}
    selection = record.get("selection")
    if selection and selection["select"] == "finetuned":
        cost = {key: selection["cost"][key] for key in COSTS}
    elif selection:
        cost["seconds"] += selection["cost"]["seconds"]
        cost["flops"] += selection["cost"]["tokens"] * tuned.shape.forward_flops_per_token
    teacher = record["inputs"].get("teacher")
    return _sum([cost, _specialization_cost(workspace, find_run(workspace, teacher["run"]))]) if teacher else cost


def _curve(tuned: Run) -> list[list[float]]:
    """[tokens, perplexity of the domain's validation text] at each evaluation of a fine-tuning."""
    records = read_json_lines(tuned.path / "metrics.jsonl")
    return [
        [record["tokens"], round(perplexity(record["valid_nll"]), 3)] for record in records if "valid_nll" in record
    ]


def _importance(run: Run) -> dict | None:
    """What importance sampling drew from the generic set, and how often that was repeated."""
    if "importance" not in run.record["inputs"]:
        return None
    facts = run.importance()
    kept = ("clusters_used", "passes_max", "passes_mean", "effective_fraction", "exp_entropy", "kl_generic")
    mixed = {key: facts[key] for key in ("domain_share", "domain_passes") if key in facts}
    return {key: facts[key] for key in kept} | mixed

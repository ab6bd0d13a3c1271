"""The paper's study in miniature: a grid of runs, cell by cell, each kept, so that a killed study goes on.

A cell is a method at a budget, a domain, a size of the domain set and a seed. Its row has the perplexity of the
domain's test text before and after fine-tuning, and what both stages cost: `results/<study>.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mlx_slm import runtime
from mlx_slm.clustering.target import Target
from mlx_slm.config import Config, format_size
from mlx_slm.errors import SlmError
from mlx_slm.evaluate import evaluate_models
from mlx_slm.experts import HISTOGRAM
from mlx_slm.pretrain import POOL, pretrain
from mlx_slm.report import Report
from mlx_slm.specialize import FROM_NONE, name_of_teacher, specialize
from mlx_slm.text.prepare import ensure_set, text_needed
from mlx_slm.text.sources import SPLITS
from mlx_slm.text.store import Store, first_windows
from mlx_slm.training.runs import Run, find_run
from mlx_slm.workspace import Workspace, fingerprint, write_text

SOURCE = {"d": "slm", "lora": "llm"}
"""Methods that start from the pretrained run of another."""


@dataclass(frozen=True)
class Cell:
    """One point of the grid. `k` is for SLM-is, `select` for SLM-pn and SLM-mix."""

    method: str
    budget: int | None
    domain: str
    domain_tokens: int
    seed: int
    k: int | None = None
    select: str | None = None

    @property
    def name(self) -> str:
        """Of its run."""
        parts = [self.method, self.select, f"k{self.k}" if self.k else None]
        parts += [format_size(self.budget) if self.budget else None, self.domain, format_size(self.domain_tokens)]
        return "-".join([*filter(None, parts), f"s{self.seed}"])


def cells(config: Config) -> Iterator[Cell]:
    """Every cell of a configuration's grid, those of one pretraining together; raises SlmError for an empty grid."""
    study = config.study
    if not study.domains:
        raise SlmError("study.domains is empty: name the sets that the study is about")
    for method in study.methods:
        for seed in study.seeds:
            for domain in study.domains:
                for size in study.domain_tokens:
                    one = Cell(method, None, domain, size, seed)
                    if method == "nopt":
                        yield one
                        continue
                    for budget in [max(study.budgets)] if method == "mix" else sorted(study.budgets):
                        at = replace(one, budget=budget)
                        if method == "is":
                            yield from (replace(at, k=k) for k in study.sampling_clusters)
                        elif method in ("pn", "mix"):
                            for select in study.selects:
                                if (method, select) != ("mix", HISTOGRAM):
                                    yield replace(at, select=select)
                        else:
                            yield at


def run_study(workspace: Workspace, config: Config, name: str, report: Report) -> list[dict]:
    """Do every cell that is not done; returns all rows, in the order of the grid."""
    file = workspace.results / f"{name}.jsonl"
    kept, todo, rows = read_rows(file), list(cells(config)), []
    settings = _settings_of_rows(workspace, config, report)
    workspace.results.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(row) + "\n" for row in kept))
    known = {row["cell"]: row for row in kept if row["settings"] == settings}
    for number, cell in enumerate(todo, 1):
        row = known.get(cell.name)
        if row is None:
            report.line(f"cell {number} of {len(todo)}: {cell.name}")
            facts = {"cell": cell.name, "settings": settings, "device": runtime.device_name(), **asdict(cell)}
            row = facts | _work(workspace, config, cell, report)
            with open(file, "a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
        rows.append(row)
    return rows


def _settings_of_rows(workspace: Workspace, config: Config, report: Report) -> str:
    """What tells the rows of one study from those of another: settings, horizon, rank, and the text.

    Prepares sets that were not, and raises SlmError, before any training, for a grid that cannot be done.
    """
    study, generic = config.study, config.data.generic
    needed = text_needed(max(study.budgets) * (POOL if "is" in study.methods else 1))
    ensure_set(workspace, generic, config, report, limit=needed)
    for domain in study.domains:
        ensure_set(workspace, domain, config, report, limit=text_needed(max(study.domain_tokens)))
        first_windows(Store(workspace.require_set(domain)), max(study.domain_tokens), config.data.seed)
    if "lora" in study.methods and study.lora_rank > config.large.dims:
        raise SlmError(f"study.lora_rank {study.lora_rank} is more than large.dims {config.large.dims}")
    stores = [Store(workspace.require_set(name, split)) for name in (generic, *study.domains) for split in SPLITS]
    settings = config.model_dump(mode="json", exclude={"study"})
    return fingerprint([settings, max(study.budgets), study.lora_rank, [store.fingerprint for store in stores]])


def read_rows(file: Path) -> list[dict]:
    """The rows of a study so far; a line that a kill cut off is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _work(workspace: Workspace, config: Config, cell: Cell, report: Report) -> dict:
    """Train, specialise and evaluate one cell."""
    own = _settings(config, cell)
    source, before = FROM_NONE, None
    if cell.method != "nopt":
        run = _pretrained(workspace, own, cell, cell.method, report)
        source = run.name if cell.method == "mix" else f"{run.name}@{cell.budget}"
    teacher = None
    if cell.method == "d":
        teacher = f"{_pretrained(workspace, own, cell, 'llm', report).name}@{cell.budget}"
    name = cell.name
    if cell.method == "llm":
        name = name_of_teacher(find_run(workspace, source), cell.domain, cell.domain_tokens)
    tuned = specialize(
        workspace,
        own,
        cell.domain,
        report,
        source,
        cell.domain_tokens,
        name,
        select=cell.select,
        lora=config.study.lora_rank if cell.method == "lora" else None,
        teacher=teacher,
    )
    if source != FROM_NONE:
        expert = _expert(tuned)
        before = _score(workspace, own, source, cell, report, expert)
    after = _score(workspace, own, tuned.name, cell, report)
    return {
        "pretrained": before,
        "specialized": after,
        "pretraining": _pretraining_cost(workspace, filter(None, (source, teacher)), cell) if before else None,
        "specialization": _specialization_cost(workspace, tuned),
        "selection": tuned.record.get("selection"),
    }


def _settings(config: Config, cell: Cell) -> Config:
    """The configuration with the cell's seed, and one long training with all budgets as its milestones."""
    budgets = sorted(config.study.budgets)
    horizon = dict.fromkeys(("steps", "passes", "hours")) | {"tokens": budgets[-1], "milestones": budgets}
    training = config.training.model_copy(update=horizon | {"seed": cell.seed})
    finetuning = config.finetuning.model_copy(update={"seed": cell.seed})
    changes = {"training": training, "finetuning": finetuning}
    if cell.k:
        changes["clusters"] = config.clusters.model_copy(update={"k": cell.k})
    if cell.method == "mix":
        changes["training"] = training.model_copy(update={"milestones": []})
    return config.model_copy(update=changes)


def _pretrained(workspace: Workspace, config: Config, cell: Cell, method: str, report: Report) -> Run:
    """The pretrained run of a method that a cell starts from."""
    method = SOURCE.get(method, method)
    if method == "is":
        name = f"is-k{cell.k}-{cell.domain}-{format_size(cell.domain_tokens)}-s{cell.seed}"
        return pretrain(workspace, config, "is", report, name, target=Target(cell.domain, cell.domain_tokens))
    return pretrain(workspace, config, method, report, f"{method}-s{cell.seed}")


def _expert(tuned: Run) -> str | None:
    """How `evaluate` names the expert that a run was specialised from."""
    selection = tuned.record.get("selection")
    if selection is None:
        return None
    return HISTOGRAM if selection["expert"] is None else str(selection["expert"])


def _score(
    workspace: Workspace, config: Config, model: str, cell: Cell, report: Report, expert: str | None = None
) -> dict:
    found = evaluate_models(workspace, config, [model], [cell.domain], "test", report, expert, cell.domain_tokens)
    return {key: found["results"][0][key] for key in ("nll", "stderr", "perplexity", "bits_per_byte", "tokens")}


def _pretraining_cost(workspace: Workspace, sources: Iterable[str], cell: Cell) -> dict:
    """What the pretraining of these runs cost up to the cell's budget: of a whole run, the share of its tokens."""
    total = dict.fromkeys(("tokens", "seconds", "flops"), 0.0)
    for source in sources:
        record = find_run(workspace, source.partition("@")[0]).record
        share = min(1.0, cell.budget / record["tokens"])
        total = {key: value + share * record[key] for key, value in total.items()}
    return total


def _specialization_cost(workspace: Workspace, tuned: Run) -> dict:
    """What a fine-tuning cost, with the choice of its expert and the fine-tuning of its teacher."""
    record = tuned.record
    found = {key: record[key] for key in ("tokens", "seconds", "flops")}
    selection = record.get("selection")
    if selection and selection["select"] == "finetuned":
        found = {key: selection["cost"][key] for key in found}
    elif selection:
        found["seconds"] += selection["cost"]["seconds"]
        found["flops"] += selection["cost"]["tokens"] * tuned.shape.forward_flops_per_token
    teacher = record["inputs"].get("teacher")
    if teacher:
        other = _specialization_cost(workspace, find_run(workspace, teacher["run"]))
        found = {key: value + other[key] for key, value in found.items()}
    return found

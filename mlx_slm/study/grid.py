"""The cells of a study, from the grids of a configuration."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from mlx_slm.config.schema import Config, Grid
from mlx_slm.errors import SlmError
from mlx_slm.fields import format_size
from mlx_slm.methods import Method, find_method
from mlx_slm.methods.base import Trains


@dataclass(frozen=True)
class Cell:
    """One fine-tuned model. `k`: clusters, for SLM-is, SLM-cis, SLM-pn and SLM-mix; `select`: for the last two."""

    method: str
    budget: int | None
    """Pretraining tokens; None for SLM-nopt."""
    domain: str
    domain_tokens: int
    seed: int
    k: int | None = None
    select: str | None = None
    teacher_budget: int | None = None
    """Pretraining tokens of the teacher, for SLM-d."""
    shared_budget: int | None = None
    """Pretraining tokens of the small model that SLM-cis goes on from."""
    variant: str | None = None
    changes: tuple[tuple[str, bool | int | float | str], ...] = ()
    """(key, value) of the settings of a variant."""

    @property
    def name(self) -> str:
        """Unique in its study."""
        parts = [self.method, f"k{self.k}" if self.k else "", self.select or ""]
        parts.append(format_size(self.budget) if self.budget else "")
        parts.append(f"t{format_size(self.teacher_budget)}" if self.teacher_budget else "")
        parts.append(f"from{format_size(self.shared_budget)}" if self.shared_budget else "")
        parts.append(self.variant or "")
        parts += [self.domain, format_size(self.domain_tokens), f"s{self.seed}"]
        return "-".join(part for part in parts if part)

    @property
    def pretrained(self) -> dict[str, int]:
        """The budget of each pretraining that it needs, by method; its own start comes first."""
        return find_method(self.method).pretrained(self.budget, self.teacher_budget or self.shared_budget)

    def trunk(self, method: str) -> str:
        """What the pretraining of a method that it needs is called in its study."""
        of, parts = find_method(method), [method]
        if of.continues:
            parts.append(f"from{format_size(self.shared_budget or 0)}")
        if of.section:
            parts.append(f"k{self.k}")
        if of.is_per_domain:
            parts += [self.domain, format_size(self.domain_tokens)]
        changes = [f"{key}_{value}" for key, value in self.changes if _concerns(key, of)]
        parts += [re.sub(r"[^\w.+-]", "_", change) for change in changes]
        return "-".join([*parts, f"s{self.seed}"])


OF_SPECIALISATION = ("finetuning", "lora", "distillation")


def _concerns(key: str, method: Method) -> bool:
    """Whether the pretraining of a method depends on a setting."""
    section = key.partition(".")[0]
    if section in ("projection", "mixture"):
        return section == method.section
    if section in ("model", "large"):
        return (section == "large") == (method.trains is Trains.LARGE)
    return bool(method.section) if section == "clusters" else section not in OF_SPECIALISATION


def cells(config: Config) -> list[Cell]:
    """Every cell of a configuration's grids, once, all of a seed before the next; raises SlmError if there is none."""
    if not config.study.grids:
        raise SlmError("study.grids is empty: a study is a list of grids, as in configs/study-mini.yaml")
    wanted = list(dict.fromkeys(cell for grid in config.study.grids for cell in _cells_of(grid, config)))
    most: dict[str, int] = {}
    for cell in wanted:
        trunk = cell.trunk(cell.method)
        most[trunk] = max(cell.budget or 0, most.get(trunk, 0))
    wanted = [c for c in wanted if find_method(c.method).milestones or c.budget == most[c.trunk(c.method)]]
    if not wanted:
        raise SlmError("study.grids: no cell is left (`histogram` is not for mixtures)")
    return sorted(wanted, key=lambda cell: cell.seed)


def _cells_of(grid: Grid, config: Config) -> Iterable[Cell]:
    for method in map(find_method, grid.methods):
        starts = method.pretrained(0, 0)
        budgets: list = sorted(grid.budgets) if starts else [None]
        clusters = (grid.clusters or [getattr(config, method.section).k]) if method.section else [None]
        selects: list = [select for select in grid.selects if select in method.selects] if method.selects else [None]
        for k, seed, budget, select, domain, size in product(
            clusters, grid.seeds, budgets, selects, grid.domains, grid.domain_tokens
        ):
            other = {method.other_budget: getattr(grid, method.other_budget) or budget} if method.other_budget else {}
            changes = tuple(sorted(grid.settings.items()))
            yield Cell(
                method.name, budget, domain, size, seed, k, select, **other, variant=grid.variant, changes=changes
            )


def budgets_of(cells: list[Cell]) -> dict[str, list[int]]:
    """The sorted budgets of each pretraining by its `trunk`: it is trained for the largest, and keeps them all."""
    tried = defaultdict(set)
    for cell in cells:
        for method, budget in cell.pretrained.items():
            tried[cell.trunk(method)].add(budget)
    return {trunk: sorted(budgets) for trunk, budgets in tried.items()}

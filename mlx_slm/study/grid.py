"""The cells of a study, from the grids of a configuration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from mlx_slm.config.schema import Config, Grid
from mlx_slm.errors import SlmError
from mlx_slm.fields import format_size
from mlx_slm.methods import find_method


@dataclass(frozen=True)
class Cell:
    """One fine-tuned model. `k`: clusters, for SLM-is, SLM-pn and SLM-mix; `select`: for the last two."""

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

    @property
    def name(self) -> str:
        """Unique in its study."""
        parts = [self.method, f"k{self.k}" if self.k else "", self.select or ""]
        parts.append(format_size(self.budget) if self.budget else "")
        parts.append(f"t{format_size(self.teacher_budget)}" if self.teacher_budget else "")
        parts += [self.domain, format_size(self.domain_tokens), f"s{self.seed}"]
        return "-".join(part for part in parts if part)

    @property
    def pretrained(self) -> dict[str, int]:
        """The budget of each pretraining that it needs, by method; its own start comes first."""
        return find_method(self.method).pretrained(self.budget, self.teacher_budget)


def cells(config: Config) -> list[Cell]:
    """Every cell of a configuration's grids, once; raises SlmError if there is none."""
    if not config.study.grids:
        raise SlmError("study.grids is empty: a study is a list of grids, as in configs/study-mini.yaml")
    wanted = list(dict.fromkeys(cell for grid in config.study.grids for cell in _cells_of(grid, config)))
    most: dict[str, int] = {}
    for cell in wanted:
        most[cell.method] = max(cell.budget or 0, most.get(cell.method, 0))
    wanted = [cell for cell in wanted if find_method(cell.method).milestones or cell.budget == most[cell.method]]
    if not wanted:
        raise SlmError("study.grids: no cell is left (`histogram` is not for mixtures)")
    return wanted


def _cells_of(grid: Grid, config: Config) -> Iterable[Cell]:
    for method in map(find_method, grid.methods):
        starts = method.pretrained(0, 0)
        budgets: list = sorted(grid.budgets) if starts else [None]
        clusters = (grid.clusters or [getattr(config, method.section).k]) if method.section else [None]
        selects: list = [select for select in grid.selects if select in method.selects] if method.selects else [None]
        for k, seed, budget, select, domain, size in product(
            clusters, grid.seeds, budgets, selects, grid.domains, grid.domain_tokens
        ):
            teacher = (grid.teacher_budget or budget) if len(starts) > 1 else None
            yield Cell(method.name, budget, domain, size, seed, k, select, teacher)


def budgets_of(cells: list[Cell]) -> dict[str, list[int]]:
    """The sorted budgets of each method that is pretrained: one run is trained for the largest, and keeps them all."""
    tried = defaultdict(set)
    for cell in cells:
        for method, budget in cell.pretrained.items():
            tried[method].add(budget)
    return {method: sorted(budgets) for method, budgets in tried.items()}

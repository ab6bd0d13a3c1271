"""Rows of a study -> Markdown tables and figures in the manner of the paper (Tables 4, 5, 8; Figures 3 to 7, 10)."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from mlx_slm.config import format_size
from mlx_slm.costs import Cost
from mlx_slm.figures import new_figure, save_figure

NAMES = {
    "slm": "SLM",
    "nopt": "SLM-nopt",
    "is": "SLM-is",
    "mix": "SLM-mix",
    "pn": "SLM-pn",
    "d": "SLM-d",
    "llm": "LLM",
    "lora": "LLM-lora",
}
PER_DOMAIN = ("is", "nopt")
"""Methods that have no generic pretraining: all they cost is paid per domain."""
DOMAINS_SHOWN = (1, 7, 50)
"""Numbers of domains of Figure 6."""


def label(row: dict) -> str:
    """How a method is called in tables and figures."""
    more = [f"k = {row['k']}" if row["k"] else None, row["select"]]
    return ", ".join([NAMES[row["method"]], *filter(None, more)])


def macro(rows: Iterable[dict], stage: str) -> tuple[float, float, int] | None:
    """(mean, half the range, seeds) of the macro perplexity over domains; None for a stage that was not scored."""
    by_seed = defaultdict(list)
    for row in rows:
        if row[stage]:
            by_seed[row["seed"]].append(row[stage]["nll"])
    if not by_seed:
        return None
    found = [math.exp(statistics.fmean(nll)) for nll in by_seed.values()]
    return statistics.fmean(found), (max(found) - min(found)) / 2, len(found)


def shown(value: tuple[float, float, int] | None) -> str:
    """'36.6 ± 0.2': half the range over seeds, where there are several."""
    if value is None:
        return "-"
    return f"{value[0]:.2f} ± {value[1]:.2f}" if value[2] > 1 else f"{value[0]:.2f}"


def grouped(rows: list[dict], key: Callable[[dict], object]) -> dict:
    """Rows by key, in the order of their first row."""
    found: dict = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def cost_of(rows: list[dict]) -> Cost:
    """Hours of a method, averaged over its rows; what is trained for one domain counts as specialization."""
    pretraining = statistics.fmean((row["pretraining"] or {"seconds": 0})["seconds"] for row in rows) / 3600
    finetuning = statistics.fmean(row["specialization"]["seconds"] for row in rows) / 3600
    if rows[0]["method"] in PER_DOMAIN:
        return Cost(0.0, pretraining + finetuning)
    return Cost(pretraining, finetuning)


def markdown(rows: list[dict], name: str) -> str:
    """All tables of a study."""
    sizes = sorted({row["domain_tokens"] for row in rows})
    domains, seeds = sorted({row["domain"] for row in rows}), sorted({row["seed"] for row in rows})
    parts = [
        f"# {name}",
        f"{len(rows)} cells; domains {', '.join(domains)}; seeds {', '.join(map(str, seeds))}. Perplexity of the test "
        "text, macro average over the domains; ± is half the range over seeds.",
    ]
    for budget, at in grouped(rows, lambda row: row["budget"]).items():
        title = f"Pretraining on {format_size(budget)} tokens" if budget else "No pretraining"
        body = []
        for method, of_method in grouped(at, label).items():
            by_size = grouped(of_method, lambda row: row["domain_tokens"])
            cells = [shown(macro(by_size.get(size, []), "specialized")) for size in sizes]
            body.append([method, shown(macro(by_size.get(sizes[-1], []), "pretrained")), *cells])
        columns = ["method", "no fine-tuning", *(f"{format_size(size)} tokens" for size in sizes)]
        parts += [f"## {title}", table(columns, body)]
    parts += ["## Cost", "Hours on the machine that ran it; totals by Eq. 1, fine-tuning on the largest domain set."]
    body = []
    for (method, budget), of_method in grouped(
        [row for row in rows if row["domain_tokens"] == sizes[-1]], lambda row: (label(row), row["budget"])
    ).items():
        cost = cost_of(of_method)
        totals = [f"{cost.total(count):.3g}" for count in DOMAINS_SHOWN]
        tokens = format_size(budget) if budget else "-"
        body.append([method, tokens, f"{cost.generic:.3g}", f"{cost.specialization:.3g}", *totals])
    columns = ["method", "pretraining tokens", "generic h", "h a domain", *(f"N = {n}" for n in DOMAINS_SHOWN)]
    parts.append(table(columns, body))
    return "\n\n".join(parts) + "\n"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(rows: list[dict], name: str, results: Path) -> list[Path]:
    """The figures that the rows allow; returns their PNGs."""
    made = [_by_tokens(rows, name, results), _by_cost(rows, name, results), _by_domains(rows, name, results)]
    if len({row["k"] for row in rows if row["k"]}) > 1:
        made.append(_by_clusters(rows, name, results))
    return made


def _panels(rows: list[dict]):
    """A figure with a panel for each size of the domain set: (figure, {size: axis})."""
    sizes = sorted({row["domain_tokens"] for row in rows})
    figure = new_figure(4.2 * len(sizes) + 1.6, 4.2)
    axes = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axis, size in zip(axes, sizes, strict=True):
        axis.set_title(f"{format_size(size)} tokens of a domain", fontsize=10)
        axis.set_ylabel("perplexity after fine-tuning")
        axis.grid(alpha=0.3)
    return figure, dict(zip(sizes, axes, strict=True))


def _legend(figure, axes: dict) -> None:
    """One legend beside all panels."""
    handles, labels = next(iter(axes.values())).get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right upper")


def _curves(rows: list[dict], name: str, what: str, x_label: str, x_of: Callable) -> object:
    figure, axes = _panels(rows)
    for size, axis in axes.items():
        at = [row for row in rows if row["domain_tokens"] == size]
        for method, of_method in grouped(at, label).items():
            if of_method[0]["method"] == "nopt":
                axis.axhline(macro(of_method, "specialized")[0], color="#999999", linestyle=":", label=method)
                continue
            points = grouped(of_method, lambda row: row["budget"])
            found = [macro(points[budget], "specialized") for budget in sorted(points)]
            xs = [x_of(budget, points[budget]) for budget in sorted(points)]
            axis.errorbar(xs, [f[0] for f in found], [f[1] for f in found], marker="o", capsize=2, label=method)
        axis.set_xscale("log")
        axis.set_xlabel(x_label)
    _legend(figure, axes)
    figure.suptitle(f"{name}: {what}")
    return figure


def _by_tokens(rows: list[dict], name: str, results: Path) -> Path:
    figure = _curves(rows, name, "pretraining tokens", "pretraining tokens", lambda budget, _: budget)
    return save_figure(figure, results / f"{name}-tokens.png")


def _by_cost(rows: list[dict], name: str, results: Path) -> Path:
    what = "all that one domain costs, pretraining and specialization"
    figure = _curves(rows, name, what, "hours", lambda _, of_method: cost_of(of_method).total(1))
    return save_figure(figure, results / f"{name}-cost.png")


def _by_domains(rows: list[dict], name: str, results: Path) -> Path:
    largest = max(row["domain_tokens"] for row in rows)
    figure = new_figure(6.4, 4.2)
    axis = figure.subplots()
    counts = list(range(1, max(DOMAINS_SHOWN) + 1))
    for method, of_method in grouped([row for row in rows if row["domain_tokens"] == largest], label).items():
        top = max(row["budget"] or 0 for row in of_method)
        cost = cost_of([row for row in of_method if (row["budget"] or 0) == top])
        axis.plot(counts, [cost.total(count) for count in counts], label=method)
    axis.set(xlabel="domains", ylabel="hours in all (Eq. 1)", xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.suptitle(f"{name}: total cost at the largest budget, {format_size(largest)} tokens of a domain")
    return save_figure(figure, results / f"{name}-domains.png")


def _by_clusters(rows: list[dict], name: str, results: Path) -> Path:
    figure, axes = _panels(rows)
    sampled = [row for row in rows if row["method"] == "is"]
    for size, axis in axes.items():
        at = [row for row in sampled if row["domain_tokens"] == size]
        for budget, of_budget in grouped(at, lambda row: row["budget"]).items():
            points = grouped(of_budget, lambda row: row["k"])
            found = [macro(points[k], "specialized") for k in sorted(points)]
            ys, ranges = [f[0] for f in found], [f[1] for f in found]
            axis.errorbar(sorted(points), ys, ranges, marker="o", capsize=2, label=f"{format_size(budget)} tokens")
        axis.set(xscale="log", xlabel="clusters")
    _legend(figure, axes)
    figure.suptitle(f"{name}: SLM-is and the number of clusters")
    return save_figure(figure, results / f"{name}-clusters.png")

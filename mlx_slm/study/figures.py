"""Rows of a study -> figures in the manner of the paper (Figures 3 to 8, 10, 11, 14)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlx_slm.fields import format_size
from mlx_slm.figures import new_figure, save_figure
from mlx_slm.methods import Method, find_method
from mlx_slm.study.tables import DOMAINS_SHOWN, by_method, cost_of, grouped, label, of_seeds, size_of_all

DASHES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")


def draw(rows: list[dict], name: str, results: Path) -> list[Path]:
    """The figures that the rows allow; returns their PNGs."""
    made = [
        _against(rows, name, results, "tokens", "pretraining tokens", lambda group: group[0]["budget"]),
        _against(rows, name, results, "cost", "TFLOPs for one domain, all included", _flops_for_one),
        _by_domains(rows, name, results),
        _finetuning_curves(rows, name, results),
    ]
    for method, of_method in grouped(rows, lambda row: row["method"]).items():
        if len({row["k"] for row in of_method}) > 1:
            made.append(_by_clusters(of_method, name, results, find_method(method)))
    return made


def styles(rows: list[dict]) -> dict[str, dict]:
    """The look of each label: a colour a method, dashes and markers for its choices."""
    looks: dict[str, dict] = {}
    for method, of_method in grouped(rows, lambda row: row["method"]).items():
        color = find_method(method).color
        for number, name in enumerate(dict.fromkeys(map(label, of_method))):
            look = number % len(DASHES)
            looks[name] = {
                "color": color,
                "linestyle": DASHES[look],
                "marker": MARKERS[look],
                "label": name,
            }
    return looks


def _flops_for_one(group: list[dict]) -> float:
    """Of pretraining and specialization, in TFLOPs; a mixture's generic share is that of all its experts."""
    return cost_of(group, "flops").total(1) / 1e12


def _flops_of_its_expert(group: list[dict]) -> float:
    """The same for one expert of a mixture, as if no other had been trained."""
    cost = cost_of(group, "flops")
    return (cost.generic / group[0]["k"] + cost.specialization) / 1e12


def _panels(titles: list[str], y_label: str):
    """(figure, axes): a panel for each title."""
    figure = new_figure(4.2 * len(titles) + 2.2, 4.2)
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(y_label)
    return figure, axes


def _finish(figure, axes, title: str, path: Path) -> Path:
    """One legend, beside several panels, of what any of them shows."""
    shown = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(axes) > 1:
        figure.legend(shown.values(), shown.keys(), fontsize=8, loc="outside right upper")
    else:
        axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    return save_figure(figure, path)


def _sizes(rows: list[dict]) -> list[int]:
    return sorted({row["domain_tokens"] for row in rows})


def _on_all_domains(rows: list[dict]) -> list[dict]:
    """Rows of the methods that were done on every domain, so that averages are of the same text."""
    domains = {row["domain"] for row in rows}
    kept = []
    for group in grouped(rows, lambda row: (label(row), row["budget"], row["domain_tokens"])).values():
        if {row["domain"] for row in group} == domains:
            kept += group
    return kept


def _against(rows: list[dict], name: str, results: Path, what: str, x_label: str, x_of: Callable) -> Path:
    """Perplexity after fine-tuning against what was spent, a panel for each size of the domain set."""
    looks, sizes = styles(rows), _sizes(rows)
    figure, axes = _panels([f"{format_size(size)} tokens of a domain" for size in sizes], "perplexity, fine-tuned")
    for size, axis in zip(sizes, axes, strict=True):
        at = _on_all_domains([row for row in rows if row["domain_tokens"] == size])
        for method, of_method in grouped(at, label).items():
            points = grouped(of_method, lambda row: row["budget"] or 0)
            scores = [of_seeds(points[budget], "specialized") for budget in sorted(points)]
            if not of_method[0]["budget"]:
                axis.axhline(scores[0][0], **looks[method] | {"marker": None})
                continue
            xs = [x_of(points[budget]) for budget in sorted(points)]
            axis.errorbar(xs, [s[0] for s in scores], [s[1] for s in scores], capsize=2, **looks[method])
            if what == "cost" and find_method(of_method[0]["method"]).takes_experts:  # Figure 8: its expert alone
                alone = [_flops_of_its_expert(points[budget]) for budget in sorted(points)]
                look = looks[method] | {"label": f"{method}, its expert alone", "markerfacecolor": "none"}
                axis.plot(alone, [s[0] for s in scores], **look)
        axis.set(xscale="log", yscale="log", xlabel=x_label)
        _plain_numbers(axis)
    return _finish(figure, axes, f"{name}: perplexity against {x_label}", results / f"{name}-{what}.png")


def _plain_numbers(axis) -> None:
    """Numbers, not powers, on logarithmic axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    if axis.get_xscale() == "log":
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        size = lambda value, _: format_size(round(value)) if value >= 1000 else f"{value:g}"  # noqa: E731
        axis.xaxis.set_major_formatter(FuncFormatter(size))
    for each in (axis.xaxis, axis.yaxis):
        each.set_minor_formatter(NullFormatter())


def _by_domains(rows: list[dict], name: str, results: Path) -> Path:
    """Figure 6: one size of the domain set, with the cost of this many domains."""
    looks, size = styles(rows), size_of_all(rows)
    at = _on_all_domains([row for row in rows if row["domain_tokens"] == size and row["budget"]])
    titles = [f"{count} domain{'s' if count > 1 else ''}" for count in DOMAINS_SHOWN]
    figure, axes = _panels(titles, f"perplexity, fine-tuned on {format_size(size)} tokens")
    for count, axis in zip(DOMAINS_SHOWN, axes, strict=True):
        for method, of_method in grouped(at, label).items():
            points = grouped(of_method, lambda row: row["budget"])
            xs = [cost_of(points[budget], "flops").total(count) / 1e12 for budget in sorted(points)]
            ys = [of_seeds(points[budget], "specialized")[0] for budget in sorted(points)]
            axis.plot(xs, ys, **looks[method])
        axis.set(xscale="log", yscale="log", xlabel="TFLOPs for all of them (Eq. 1)")
        _plain_numbers(axis)
    return _finish(figure, axes, f"{name}: cost of several domains", results / f"{name}-domains.png")


def _finetuning_curves(rows: list[dict], name: str, results: Path) -> Path:
    """Validation perplexity while fine-tuning (App. C): one domain, one seed, the largest budget of each method."""
    domain, seed, sizes = rows[0]["domain"], rows[0]["seed"], _sizes(rows)
    looks = styles(rows)
    figure, axes = _panels([f"{format_size(size)} tokens of {domain}" for size in sizes], "validation perplexity")
    for size, axis in zip(sizes, axes, strict=True):
        at = [r for r in rows if (r["domain"], r["seed"], r["domain_tokens"]) == (domain, seed, size)]
        last = {method: group for (method, _), group in by_method(sorted(at, key=lambda r: r["budget"] or 0)).items()}
        for method, group in last.items():
            points = group[0]["curve"]
            xs, ys = [point[0] / size for point in points], [point[1] for point in points]
            axis.plot(xs, ys, **looks[method] | {"marker": None})
        axis.set(yscale="log", xlabel="tokens read, in sizes of the domain set")
        _plain_numbers(axis)
    return _finish(figure, axes, f"{name}: fine-tuning, until early stopping", results / f"{name}-finetuning.png")


def _by_clusters(of_method: list[dict], name: str, results: Path, method: Method) -> Path:
    """Figures 7 and 10: the number of clusters, on the domains that every number was tried on."""
    tried = {row["k"] for row in of_method}
    full = grouped(of_method, lambda row: (row["domain"], row["domain_tokens"], row["select"], row["budget"]))
    shown = {key: group for key, group in full.items() if {row["k"] for row in group} == tried}
    figure, axes = _panels([method.label], "perplexity, fine-tuned")
    for (domain, size, select, budget), group in shown.items():
        points = grouped(group, lambda row: row["k"])
        scores = [of_seeds(points[k], "specialized") for k in sorted(points)]
        text = ", ".join(filter(None, [domain, f"{format_size(size)} tokens", select, f"after {format_size(budget)}"]))
        axes[0].errorbar(
            sorted(points), [s[0] for s in scores], [s[1] for s in scores], marker="o", capsize=2, label=text
        )
    axes[0].set(xscale="log", xlabel="clusters")
    axes[0].set_xticks(sorted(tried), map(str, sorted(tried)))
    axes[0].minorticks_off()
    return _finish(figure, axes, f"{name}: the number of clusters", results / f"{name}-clusters-{method.name}.png")

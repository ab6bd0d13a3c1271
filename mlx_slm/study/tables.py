"""Rows of a study -> Markdown tables in the manner of the paper (Tables 3, 4, 5, 8, 9, 10)."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable

from mlx_slm.config import format_size
from mlx_slm.costs import Cost

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
    more += [f"teacher {format_size(row['teacher_budget'])}" if row["teacher_budget"] else None]
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
    return f"{value[0]:.1f} ± {value[1]:.1f}" if value[2] > 1 else f"{value[0]:.1f}"


def grouped(rows: list[dict], key: Callable[[dict], object]) -> dict:
    """Rows by key, in the order of their first row."""
    found: dict = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def cost_of(rows: list[dict], unit: str = "hours") -> Cost:
    """Of a method, averaged over its rows, in `hours` or `flops`; what is trained for one domain is specialization."""
    key, per = ("flops", 1) if unit == "flops" else ("seconds", 3600)
    pretraining = statistics.fmean((row["pretraining"] or {key: 0})[key] for row in rows) / per
    finetuning = statistics.fmean(row["specialization"][key] for row in rows) / per
    if rows[0]["method"] in PER_DOMAIN:
        return Cost(0.0, pretraining + finetuning)
    return Cost(pretraining, finetuning)


def by_method(rows: list[dict]) -> dict:
    """Rows by (label, budget): the lines of the tables."""
    return grouped(rows, lambda row: (label(row), row["budget"]))


def markdown(rows: list[dict], name: str) -> str:
    """All tables of a study."""
    domains, seeds = sorted({row["domain"] for row in rows}), sorted({row["seed"] for row in rows})
    devices = sorted({row["device"] for row in rows})
    parts = [
        f"# {name}",
        f"{len(rows)} cells; domains {', '.join(domains)}; seeds {', '.join(map(str, seeds))}; device: "
        f"{', '.join(devices)}. Perplexity, macro average over the domains; ± is half the range over seeds.",
        "## Perplexity of the domains' test text (Tables 4 and 8)",
        _perplexities(rows, domains),
    ]
    if len(domains) > 1:
        parts += ["## By domain", _by_domain(rows, domains)]
    parts += [
        "## Cost (Table 3, Eq. 1)",
        "Hours of one job on its device, and FLOPs. `a domain`: specialization, with the choice of the expert and the "
        "fine-tuning of the teacher; for SLM-is the pretraining too, which is paid for each domain. Totals for N "
        "domains are of the largest domain set.",
        _costs(rows),
    ]
    if any(row["importance"] for row in rows):
        parts += ["## What importance sampling drew (Tables 9 and 10)", _sampling(rows)]
    if any(row["selection"] for row in rows):
        parts += ["## Which expert (Table 5)", _selections(rows)]
    return "\n\n".join(parts) + "\n"


def _perplexities(rows: list[dict], domains: list[str]) -> str:
    sizes, body = sorted({row["domain_tokens"] for row in rows}), []
    for (method, budget), of_method in by_method(rows).items():
        by_size = grouped(of_method, lambda row: row["domain_tokens"])
        partly = " *" if {row["domain"] for row in of_method} != set(domains) else ""
        flops = (of_method[0]["pretraining"] or {"flops": 0})["flops"]
        body.append(
            [
                method + partly,
                format_size(budget) if budget else "-",
                f"{flops / 1e12:.3g}",
                shown(macro(of_method, "generic")),
                shown(macro(by_size[max(by_size)], "pretrained")),
                *(shown(macro(by_size.get(size, []), "specialized")) for size in sizes),
            ]
        )
    columns = ["method", "pretraining tokens", "TFLOPs", "generic text", "no fine-tuning"]
    columns += [f"{format_size(size)} tokens" for size in sizes]
    note = "\n\n\\* not on all domains: see below." if any(line[0].endswith("*") for line in body) else ""
    return table(columns, body) + note


def _by_domain(rows: list[dict], domains: list[str]) -> str:
    body = []
    for (method, budget), of_method in by_method(rows).items():
        for size, of_size in grouped(of_method, lambda row: row["domain_tokens"]).items():
            found = grouped(of_size, lambda row: row["domain"])
            cells = [shown(macro(found.get(domain, []), "specialized")) for domain in domains]
            body.append([method, format_size(budget) if budget else "-", format_size(size), *cells])
    return table(["method", "pretraining tokens", "domain tokens", *domains], body)


def _costs(rows: list[dict]) -> str:
    sizes, body = sorted({row["domain_tokens"] for row in rows}), []
    for (method, budget), of_method in by_method(rows).items():
        by_size = grouped(of_method, lambda row: row["domain_tokens"])
        costs = {size: cost_of(found) for size, found in by_size.items()}
        most = max(by_size)
        flops = cost_of(by_size[most], "flops")
        body.append(
            [
                method,
                format_size(budget) if budget else "-",
                f"{costs[most].generic:.3g}",
                *(f"{costs[size].specialization:.3g}" if size in costs else "-" for size in sizes),
                *(f"{costs[most].total(count):.3g}" for count in DOMAINS_SHOWN),
                *(f"{flops.total(count) / 1e12:.3g}" for count in DOMAINS_SHOWN),
            ]
        )
    columns = ["method", "pretraining tokens", "generic h", *(f"h a domain, {format_size(size)}" for size in sizes)]
    columns += [f"h, N = {count}" for count in DOMAINS_SHOWN] + [f"TFLOPs, N = {count}" for count in DOMAINS_SHOWN]
    return table(columns, body)


def _sampling(rows: list[dict]) -> str:
    runs = grouped(
        [row for row in rows if row["importance"]],
        lambda row: (row["domain"], row["k"], row["domain_tokens"]),
    )
    body = [
        [
            domain,
            str(k),
            format_size(size),
            str(found[0]["importance"]["clusters_used"]),
            f"{math.log(found[0]['importance']['exp_entropy']):.2f}",
            f"{found[0]['importance']['kl_generic']:.2f}",
            f"{found[0]['importance']['passes_max']:.2f}",
            f"{found[0]['importance']['passes_mean']:.2f}",
            f"{found[0]['importance']['effective_fraction']:.1%}",
        ]
        for (domain, k, size), found in sorted(runs.items())
    ]
    columns = ["domain", "k", "domain tokens", "clusters used", "entropy, nats", "KL(domain, generic), nats"]
    columns += ["passes, max", "passes, mean", "effective size"]
    return table(columns, body)


def _selections(rows: list[dict]) -> str:
    body = []
    for (method, budget), of_method in by_method([row for row in rows if row["selection"]]).items():
        for domain, found in grouped(of_method, lambda row: row["domain"]).items():
            experts = sorted(
                {str(row["selection"]["expert"]) for row in found if row["selection"]["expert"] is not None}
            )
            shares = [row["selection"]["share"] for row in found if row["selection"]["share"] is not None]
            body.append(
                [
                    method,
                    format_size(budget),
                    domain,
                    ", ".join(experts) or "all",
                    f"{statistics.fmean(shares):.0%}" if shares else "-",
                    shown(macro(found, "pretrained")),
                    shown(macro(found, "specialized")),
                    f"{cost_of(found).specialization:.3g}",
                ]
            )
    columns = ["method", "pretraining tokens", "domain", "experts", "share of the domain", "no fine-tuning"]
    return table([*columns, "fine-tuned, all sizes", "h a domain"], body)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

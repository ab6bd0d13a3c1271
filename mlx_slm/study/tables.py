"""Rows of a study -> Markdown tables in the manner of the paper (Tables 3, 4, 5, 8, 9, 10)."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable

from mlx_slm.fields import format_size
from mlx_slm.methods import find_method
from mlx_slm.methods.costs import Cost
from mlx_slm.report import perplexity

DOMAINS_SHOWN = (1, 7, 50)
"""Numbers of domains of Figure 6."""


def label(row: dict) -> str:
    """How a method is called in tables and figures."""
    more = [f"k = {row['k']}" if row["k"] else None, row["select"]]
    more += [f"teacher {format_size(row['teacher_budget'])}" if row["teacher_budget"] else None]
    more += [f"after {format_size(row['shared_budget'])}" if row["shared_budget"] else None, row["variant"]]
    return ", ".join([find_method(row["method"]).label, *filter(None, more)])


def macro(rows: Iterable[dict], stage: str) -> tuple[float, float, int] | None:
    """`of_seeds` of the rows that have the stage; None for a stage that was not scored."""
    scored = [row for row in rows if row[stage]]
    return of_seeds(scored, stage) if scored else None


def of_seeds(rows: Iterable[dict], stage: str) -> tuple[float, float, int]:
    """(mean, half the range, seeds) of the macro perplexity over domains."""
    by_seed = defaultdict(list)
    for row in rows:
        by_seed[row["seed"]].append(row[stage]["nll"])
    scores = [perplexity(statistics.fmean(nll)) for nll in by_seed.values()]
    return statistics.fmean(scores), (max(scores) - min(scores)) / 2, len(scores)


def shown(value: tuple[float, float, int] | None) -> str:
    """'36.6 ± 0.2': half the range over seeds, where there are several."""
    if value is None:
        return "-"
    return f"{value[0]:.1f} ± {value[1]:.1f}" if value[2] > 1 else f"{value[0]:.1f}"


def grouped(rows: list[dict], key: Callable[[dict], object]) -> dict:
    """Rows by key, in the order of their first row."""
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def cost_of(rows: list[dict], unit: str = "hours") -> Cost:
    """Of a method, averaged over its rows, in `hours` or `flops`; what is trained for one domain is specialization."""
    key, per = ("flops", 1) if unit == "flops" else ("seconds", 3600)
    pretraining, shared, finetuning = (
        statistics.fmean(row[part][key] for row in rows) / per for part in ("pretraining", "shared", "specialization")
    )
    return Cost(shared, pretraining - shared + finetuning)


def by_method(rows: list[dict]) -> dict:
    """Rows by (label, budget): the lines of the tables."""
    return grouped(rows, lambda row: (label(row), row["budget"]))


def size_of_all(rows: list[dict]) -> int:
    """The largest domain set that the most lines of the tables have: what they are compared at."""
    sizes = [{row["domain_tokens"] for row in group} for group in by_method(rows).values()]
    return max(set.union(*sizes), key=lambda size: (sum(size in group for group in sizes), size))


def markdown(rows: list[dict], name: str, summaries: list[dict]) -> str:
    """All tables of a study. `summaries`: how its sets lie over clusters (`Study.histograms`)."""
    domains, seeds = sorted({row["domain"] for row in rows}), sorted({row["seed"] for row in rows})
    devices, size = sorted({row["device"] for row in rows}), size_of_all(rows)
    parts = [
        f"# {name}",
        f"{len(rows)} cells; domains {', '.join(domains)}; seeds {', '.join(map(str, seeds))}; device: "
        f"{', '.join(devices)}. Perplexity, macro average over the domains; ± is half the range over seeds.",
        "## Perplexity of the domains' test text (Tables 4 and 8)",
        f"Generic text and no fine-tuning: of the start for {format_size(size)} tokens of a domain. TFLOPs: of "
        "pretraining, of teacher and student for SLM-d.",
        perplexities(rows, domains, size),
    ]
    if len(domains) > 1:
        parts += ["## By domain", by_domain(rows, domains)]
    parts += [
        "## Cost (Table 3, Eq. 1)",
        "Hours of the steps of one job on its device, evaluations left out, and FLOPs. `a domain`: specialization, "
        "with choosing the expert and fine-tuning the teacher, for SLM-is the pretraining, for SLM-cis its last part. "
        f"Totals for N domains of {format_size(size)} tokens.",
        costs(rows, size),
    ]
    if summaries:
        parts += ["## Sets over clusters (Tables 9 and 10)", over_clusters(summaries)]
    if any(row["importance"] for row in rows):
        parts += ["## What importance sampling drew, at its largest budget", sampling(rows)]
    if any(row["selection"] for row in rows):
        parts += [f"## Which expert, for {format_size(size)} tokens (Table 5)", selections(rows, size)]
    return "\n\n".join(parts) + "\n"


def perplexities(rows: list[dict], domains: list[str], size: int) -> str:
    sizes, body = sorted({row["domain_tokens"] for row in rows}), []

    def over_domains(group: list[dict], stage: str) -> str:
        return shown(macro(group, stage)) + (" *" if group and {row["domain"] for row in group} != set(domains) else "")

    for (method, budget), of_method in by_method(rows).items():
        by_size = grouped(of_method, lambda row: row["domain_tokens"])
        start = by_size.get(size, of_method)
        body.append(
            [
                method,
                format_size(budget) if budget else "-",
                f"{start[0]['pretraining']['flops'] / 1e12:.3g}",
                shown(macro(start, "generic")),
                over_domains(start, "pretrained") if budget else "-",
                *(over_domains(by_size.get(each, []), "specialized") for each in sizes),
            ]
        )
    columns = ["method", "pretraining tokens", "TFLOPs", "generic text", "no fine-tuning"]
    columns += [f"{format_size(each)} tokens" for each in sizes]
    note = "\n\n\\* not on all domains: see below." if any("*" in cell for line in body for cell in line) else ""
    return table(columns, body) + note


def by_domain(rows: list[dict], domains: list[str]) -> str:
    body = []
    for (method, budget), of_method in by_method(rows).items():
        for size, of_size in grouped(of_method, lambda row: row["domain_tokens"]).items():
            groups = grouped(of_size, lambda row: row["domain"])
            cells = [shown(macro(groups.get(domain, []), "specialized")) for domain in domains]
            body.append([method, format_size(budget) if budget else "-", format_size(size), *cells])
    return table(["method", "pretraining tokens", "domain tokens", *domains], body)


def costs(rows: list[dict], size: int) -> str:
    sizes, body = sorted({row["domain_tokens"] for row in rows}), []
    for (method, budget), of_method in by_method(rows).items():
        by_size = grouped(of_method, lambda row: row["domain_tokens"])
        hours = {each: cost_of(group) for each, group in by_size.items()}
        compared = hours.get(size), cost_of(by_size[size], "flops") if size in by_size else None
        body.append(
            [
                method,
                format_size(budget) if budget else "-",
                f"{next(iter(hours.values())).generic:.3g}",
                *(f"{hours[each].specialization:.3g}" if each in hours else "-" for each in sizes),
                *(
                    f"{cost.total(count) / unit:.3g}" if cost else "-"
                    for cost, unit in zip(compared, (1, 1e12), strict=True)
                    for count in DOMAINS_SHOWN
                ),
            ]
        )
    columns = ["method", "pretraining tokens", "generic h", *(f"h a domain, {format_size(each)}" for each in sizes)]
    columns += [f"h, N = {count}" for count in DOMAINS_SHOWN] + [f"TFLOPs, N = {count}" for count in DOMAINS_SHOWN]
    return table(columns, body)


def over_clusters(summaries: list[dict]) -> str:
    sets = [row["set"] for row in summaries[0]["sets"]]
    body = []
    for number, name in enumerate(sets):
        rows = [one["sets"][number] for one in summaries]
        body.append([name, *(f"{row['largest']:.2f}" for row in rows), *(f"{row['entropy']:.2f}" for row in rows)])
    counts = [one["k"] for one in summaries]
    columns = ["set", *(f"most frequent, k = {k}" for k in counts), *(f"entropy, nats, k = {k}" for k in counts)]
    return table(columns, body)


def sampling(rows: list[dict]) -> str:
    most: dict[str, int] = {}
    for row in rows:
        most[label(row)] = max(row["budget"] or 0, most.get(label(row), 0))
    runs = grouped(
        [row for row in rows if row["importance"] and row["budget"] == most[label(row)]],
        lambda row: (label(row), row["domain"], row["domain_tokens"]),
    )
    body = [
        [
            method,
            domain,
            format_size(size),
            str(group[0]["importance"]["clusters_used"]),
            f"{math.log(group[0]['importance']['exp_entropy']):.2f}",
            "infinite" if (kl := group[0]["importance"]["kl_generic"]) is None else f"{kl:.2f}",
            f"{group[0]['importance']['passes_max']:.2f}",
            f"{group[0]['importance']['passes_mean']:.2f}",
            f"{group[0]['importance']['effective_fraction']:.1%}",
            f"{group[0]['importance'].get('domain_passes', 0):.1f}",
        ]
        for (method, domain, size), group in sorted(runs.items())
    ]
    columns = ["method", "domain", "domain tokens", "clusters used", "entropy, nats", "KL(domain, generic), nats"]
    columns += ["passes, max", "passes, mean", "effective size", "passes over the domain"]
    return table(columns, body)


def selections(rows: list[dict], size: int) -> str:
    body, chosen = [], [row for row in rows if row["selection"] and row["domain_tokens"] == size]
    for (method, budget), of_method in by_method(chosen).items():
        for domain, group in grouped(of_method, lambda row: row["domain"]).items():
            experts = sorted(
                {str(row["selection"]["expert"]) for row in group if row["selection"]["expert"] is not None}
            )
            shares = [row["selection"]["share"] for row in group if row["selection"]["share"] is not None]
            body.append(
                [
                    method,
                    format_size(budget),
                    domain,
                    ", ".join(experts) or "all",
                    f"{statistics.fmean(shares):.0%}" if shares else "-",
                    shown(macro(group, "pretrained")),
                    shown(macro(group, "specialized")),
                    f"{cost_of(group).specialization:.3g}",
                ]
            )
    columns = ["method", "pretraining tokens", "domain", "experts", "share of the domain", "no fine-tuning"]
    return table([*columns, "fine-tuned", "h a domain"], body)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

"""Tables of what was measured before the study: networks, mixtures and encoders."""

from __future__ import annotations

from scripts.tables.records import of, ordered, records, shown, table

LONG = (2_500_000, 5_000_000, 10_000_000, 20_000_000)
TEXTS = {"generic": 1, "pubmed": 2, "wikipedia": 2}


def miniature(name: str) -> list[dict]:
    return [r for r in records("2026-11-23-xeon-miniature.jsonl") if r["table"] == name]


def miniature_order() -> str:
    rows = miniature("order")
    lines = [
        [domain, method, *(shown(of(rows, domain=domain, method=method, budget=budget)) for budget in LONG)]
        for domain, method in ordered(rows, "domain", "method")
    ]
    return table(["domain", "method", *(f"{budget / 1e6:g}M tokens" for budget in LONG)], lines)


def miniature_generic() -> str:
    rows = miniature("generic")
    lines = [
        [method, *(shown(of(rows, method=method, budget=budget), 1) for budget in LONG)]
        for (method,) in ordered(rows, "method")
    ]
    return table(["generic text, held out", *(f"{budget / 1e6:g}M tokens" for budget in LONG)], lines)


def miniature_choice() -> str:
    rows = miniature("choice")

    def cell(method: str, select: str, domain: str) -> str:
        found = [r for r in rows if (r["method"], r["select"], r["domain"]) == (method, select, domain)]
        if not found:
            return "-"
        return f"{found[0]['perplexity']:.2f}" + ("" if found[0]["expert"] is None else f" ({found[0]['expert']})")

    lines = []
    for method, select in ordered(rows, "method", "select"):
        first = next(r for r in rows if (r["method"], r["select"]) == (method, select))
        cells = [cell(method, select, domain) for domain in ("pubmed", "freelaw", "wikipedia")]
        lines.append([method, f"`{select}`", *cells, f"{first['choosing_seconds']}", f"{first['seconds']}"])
    head = ["", "choice", "pubmed", "freelaw", "wikipedia", "choosing, s (pubmed)", "fine-tuning, s (pubmed)"]
    return table(head, lines)


def miniature_helps() -> str:
    rows = miniature("helps")
    lines = [
        [change, *(shown(of(rows, change=change, text=text), digits) for text, digits in TEXTS.items())]
        for (change,) in ordered(rows, "change")
    ]
    return table(["2.5M tokens", "generic, routed", "pubmed, fine-tuned", "wikipedia, fine-tuned"], lines)


def encoders_agreement() -> str:
    rows = [r for r in records("2026-11-23-xeon-encoders.jsonl") if r["table"] == "agreement"]
    found = {(r["between"], r["k"]): r["adjusted_rand"] for r in rows}
    lines = [[name, *(f"{found[name, k]:.2f}" for k in (16, 64))] for (name,) in ordered(rows, "between")]
    return table(["adjusted Rand index", "k = 16", "k = 64"], lines)


def encoders_models() -> str:
    rows = [r for r in records("2026-11-23-xeon-encoders.jsonl") if r["table"] == "encoders"]
    lines = []
    for (method,) in ordered(rows, "method"):
        found = [r for r in rows if r["method"] == method]
        passes = ", ".join(f"{value:.1f}" for value in found[0]["passes"] or [])
        lines.append(
            [method, shown([r["pretrained"] for r in found], 1), shown([r["specialized"] for r in found]), passes]
        )
    return table(["", "pretrained, per seed", "fine-tuned, per seed", "passes, max and mean"], lines)

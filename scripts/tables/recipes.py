"""Tables of what lies beyond the paper: one for each recipe, against the same training without it."""

from __future__ import annotations

from scripts.tables.records import records, table

DOMAINS = ("pubmed", "stackexchange")
PLAIN: dict = {}


def found(domain: str, method: str, settings: dict, **more: object) -> dict | None:
    """The row of a training; of several that fit, the first."""
    wanted = {"domain_tokens": 64_000, "k": {"slm": None, "cis": None, "pn": 16}.get(method, 64)} | more
    for row in records("2026-11-28-xeon-recipes.jsonl"):
        same = (row["domain"], row["method"], row["settings"]) == (domain, method, settings)
        if same and all(row.get(key) == value for key, value in wanted.items() if key in row or value is not None):
            return row
    return None


def against(row: dict | None, plain: dict | None, stage: str = "specialized") -> str:
    """'28.5 (-13.5 %)': a perplexity, and its difference to that of the plain training."""
    if row is None:
        return "-"
    value = row[stage]["perplexity"]
    if plain is None or row is plain:
        return f"{value:.1f}"
    return f"{value:.1f} ({100 * (value / plain[stage]['perplexity'] - 1):+.1f} %)"


def compared(first: str, lines: list[tuple[str, str, dict, dict]], stages: bool = True, plain: int = 0) -> str:
    """A table with a line for each (label, method, settings, other fields), against line `plain`."""
    head = [first]
    for domain in DOMAINS:
        head += [f"{domain}, no fine-tuning"] if stages else []
        head.append(f"{domain}, fine-tuned")
    body = []
    for label, method, settings, more in lines:
        cells = [label]
        for domain in DOMAINS:
            _, other, base, fields = lines[plain]
            row, start = found(domain, method, settings, **more), found(domain, other, base, **fields)
            cells += [against(row, start, "pretrained")] if stages else []
            cells.append(against(row, start))
        if any(cell != "-" for cell in cells[1:]):
            body.append(cells)
    return table(head, body)


def early_mixing() -> str:
    shares = [
        (f"{share:.0%}" if share else "none", "is", {"clusters.domain_share": share} if share else PLAIN, {})
        for share in (0, 0.03, 0.1, 0.2, 0.4)
    ]
    return compared("share of the domain's rows, SLM-is", shares)


def early_mixing_16k() -> str:
    rows = []
    for share in (0, 0.05, 0.2):
        settings = {"clusters.domain_share": share} if share else PLAIN
        row, plain = (found("pubmed", "is", each, domain_tokens=16_000) for each in (settings, PLAIN))
        passes = share * 6_000_000 / 16_000
        cells = [f"{share:.0%}" if share else "none", f"{passes:.0f}"]
        rows.append([*cells, against(row, plain, "pretrained"), against(row, plain)])
    head = ["share, 16k tokens of pubmed", "passes over them", "no fine-tuning", "fine-tuned"]
    return table(head, rows)


def cooldown() -> str:
    cool, mixed = {"training.cooldown": 0.2}, {"clusters.domain_share": 0.2}
    late = cool | {"clusters.cooldown_share": 0.3}
    sampled = [
        ("constant rate", "is", PLAIN, {}),
        ("falling in the last fifth", "is", cool, {}),
        ("in the last two fifths", "is", {"training.cooldown": 0.4}, {}),
        ("in the last fifth, 30 % of its rows the domain's", "is", late, {}),
    ]
    both = [("constant rate", "is", mixed, {}), ("falling in the last fifth", "is", cool | mixed, {})]
    generic = [("constant rate", "slm", PLAIN, {}), ("falling in the last fifth", "slm", cool, {})]
    parts = ("SLM", generic), ("SLM-is", sampled), ("SLM-is, a fifth of the rows the domain's", both)
    return "\n\n".join(compared(*part) for part in parts)


def replay() -> str:
    parts = []
    for first, method, start, shares in (
        ("SLM, fine-tuning", "slm", PLAIN, (0.25, 0.5)),
        ("SLM-is, fine-tuning", "is", PLAIN, (0.25,)),
    ):
        lines = [("on the domain alone", method, start, {})]
        lines += [
            (f"{share:.0%} of the rows replayed", method, start | {"finetuning.replay": share}, {}) for share in shares
        ]
        parts.append(compared(first, lines, stages=False))
    return "\n\n".join(parts)


def continued() -> str:
    shared = {"tokens": 1_500_000, "shared_tokens": 4_500_000}
    falling = {"training.cooldown": 0.9}
    return compared(
        "6M tokens in all",
        [
            ("SLM-is, all for one domain", "is", PLAIN, {}),
            ("SLM, all shared", "slm", PLAIN, {}),
            ("SLM-cis: 4.5M shared, 1.5M for the domain", "cis", PLAIN, shared),
            ("the same, falling rate", "cis", falling, shared),
            ("the same, a fifth of its rows the domain's", "cis", falling | {"clusters.domain_share": 0.2}, shared),
        ],
    )


def soup() -> str:
    soups = ("soups for half of the groups", "pn", {"projection.soup": 0.5}, {})
    return compared("SLM-pn, k = 16, histogram", [("each group through one expert", "pn", PLAIN, {}), soups])


def learned_weights() -> str:
    lines = [
        ("the domain's histogram", "is", PLAIN, {"k": 16, "weights": None}),
        ("learned from SLM-pn's experts", "is", PLAIN, {"k": 16, "weights": "learned from pn"}),
    ]
    return compared("SLM-is, k = 16", lines)

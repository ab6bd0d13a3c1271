"""Tables of the study in miniature."""

from __future__ import annotations

import math

from scripts.tables.records import percent, records, shown, table

DOMAINS = ("pubmed", "freelaw", "stackexchange")


def study() -> list[dict]:
    return records("2026-11-28-xeon-study-mini.jsonl")


MAIN = {
    ("slm", None, None): "SLM",
    ("is", 64, None): "SLM-is, k = 64",
    ("pn", 16, "histogram"): "SLM-pn, k = 16, histogram",
    ("pn", 16, "frequent"): "SLM-pn, k = 16, frequent",
}
BUDGETS = (1_800_000, 6_000_000, 18_000_000)


def seeds(method: tuple, domain: str, budget: int | None, tokens: int) -> list[float]:
    """The perplexity after fine-tuning of each seed of a cell."""
    cells = [
        r
        for r in study()
        if (r["method"], r["k"], r["select"]) == method
        and (r["domain"], r["budget"], r["domain_tokens"]) == (domain, budget, tokens)
    ]
    return [r["specialized"]["perplexity"] for r in sorted(cells, key=lambda r: r["seed"])]


def study_crossing() -> str:
    """SLM-pn against SLM at 54M tokens, seed 0: each stage, and the network's difference."""
    found = {(r["method"], r["domain"]): r for r in records("2026-12-01-xeon-study-long.jsonl")}
    first = {method: found[method, DOMAINS[0]] for method in ("slm", "pn")}
    pairs = [("generic text, held out", *(first[method]["generic"]["perplexity"] for method in ("slm", "pn")))]
    for stage, said in (("pretrained", "no fine-tuning"), ("specialized", "fine-tuned on 64k")):
        pairs += [
            (f"{domain}, {said}", *(found[method, domain][stage]["perplexity"] for method in ("slm", "pn")))
            for domain in DOMAINS
        ]
    body = [
        [name, f"{small:.1f}", f"{network:.1f}", percent([math.log(network / small)])] for name, small, network in pairs
    ]
    return table(["900 tokens a parameter (54M)", "SLM", "SLM-pn, k = 16, histogram", ""], body)


def study_order() -> str:
    head = ["domain", "method", "30 tokens a parameter (1.8M)", "100 (6M)", "300 (18M)"]
    return table(
        head,
        [
            [domain, label, *(shown(seeds(method, domain, budget, 64_000), 1) for budget in BUDGETS)]
            for domain in DOMAINS
            for method, label in MAIN.items()
        ],
    )


def study_against() -> str:
    """Differences of logarithms of perplexity to SLM's with the same seed, means over domains and seeds."""
    small, *others = MAIN
    rows = []
    for method in others:
        all_pairs: dict[int, list[float]] = {budget: [] for budget in BUDGETS}
        for domain in DOMAINS:
            cells = []
            for budget in BUDGETS:
                pairs = zip(seeds(method, domain, budget, 64_000), seeds(small, domain, budget, 64_000), strict=True)
                gains = [math.log(ours / theirs) for ours, theirs in pairs]
                all_pairs[budget] += gains
                cells.append(percent(gains))
            rows.append([MAIN[method], domain, *cells])
        means = [
            f"{percent(gains)} ({sum(gain < 0 for gain in gains)} of {len(gains)} pairs lower)"
            for gains in all_pairs.values()
        ]
        rows.append([MAIN[method], "mean", *means])
    return table(["method", "domain", "30", "100", "300"], rows)


def study_sizes() -> str:
    methods: dict[tuple, tuple[str, int | None]] = {
        ("slm", None, None): ("SLM", 6_000_000),
        ("nopt", None, None): ("SLM-nopt", None),
        ("is", 64, None): ("SLM-is, k = 64", 6_000_000),
        ("pn", 16, "histogram"): ("SLM-pn, histogram", 6_000_000),
    }
    rows = [
        [label, domain, *(shown(seeds(method, domain, budget, size), 1) for size in (16_000, 64_000, 256_000))]
        for method, (label, budget) in methods.items()
        for domain in ("pubmed", "stackexchange")
    ]
    return table(["method, 6M tokens", "domain", "16k", "64k", "256k"], rows)


def study_others() -> str:
    methods = [
        ("SLM", ("slm", None, None), BUDGETS),
        ("SLM-is, k = 16", ("is", 16, None), (6_000_000,)),
        ("SLM-is, k = 64", ("is", 64, None), BUDGETS),
        ("SLM-is, k = 256", ("is", 256, None), (6_000_000,)),
        ("LLM", ("llm", None, None), BUDGETS[:2]),
        ("LLM-lora, rank 64", ("lora", None, None), (6_000_000,)),
        ("SLM-mix, k = 4, frequent", ("mix", 4, "frequent"), (6_000_000,)),
        ("SLM-d, teacher LLM 6M", ("d", None, None), (6_000_000,)),
    ]
    rows = [
        [
            label,
            f"{budget / 1e6:g}M",
            *(shown(seeds(method, domain, budget, 64_000), 1) for domain in ("pubmed", "stackexchange")),
        ]
        for label, method, budgets in methods
        for budget in budgets
    ]
    return table(["64k tokens", "pretraining", "pubmed", "stackexchange"], rows)

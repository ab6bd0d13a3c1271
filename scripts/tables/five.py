"""Tables of the study on five domains: the paper's methods and what lies beyond it."""

from __future__ import annotations

import math

from mlx_slm.study import tables as product
from scripts.tables.records import percent, records, shown, table

FIVE = ("pubmed", "stackexchange", "freelaw", "wikipedia", "europarl")


def rows() -> list[dict]:
    return records("2026-11-30-xeon-study-five.jsonl")


def perplexity(
    domain: str, seed: int, tokens: int, method: str, variant: str | None = None, k: int | None = None
) -> float | None:
    """After fine-tuning on `tokens` tokens of a domain; None for a cell that was not done."""
    for row in rows():
        same = (row["domain"], row["seed"], row["domain_tokens"], row["method"], row["variant"])
        if same == (domain, seed, tokens, method, variant) and k in (None, row["k"]):
            return row["specialized"]["perplexity"]
    return None


def pairs(tokens: int, ours: tuple, theirs: tuple, domain: str) -> list[float]:
    """Differences of logarithms of two methods (method, variant, k), for each seed that has both."""
    found = [(perplexity(domain, s, tokens, *ours), perplexity(domain, s, tokens, *theirs)) for s in (0, 1)]
    return [math.log(one / other) for one, other in found if one and other]


LINES = {
    ("slm", None, None): "SLM",
    ("is", None, 64): "SLM-is, k = 64",
    ("is", None, 16): "SLM-is, k = 16",
    ("is", None, 256): "SLM-is, k = 256",
    ("is", None, 1024): "SLM-is, k = 1,024",
    ("is", None, 4096): "SLM-is, k = 4,096, a tree of 64 x 64",
    ("slm", "replayed", None): "SLM, a quarter replayed in fine-tuning",
    ("is", "replayed", 64): "SLM-is, a quarter replayed",
    ("is", "mixed", 64): "SLM-is, early mixing, falling rate",
    ("is", "mixed-replayed", 64): "the same, a quarter replayed in fine-tuning",
    ("cis", "mixed", 64): "SLM-cis: 4.5M shared, 1.5M for the domain, early mixing, falling rate",
    ("pn", None, 16): "SLM-pn, k = 16, histogram",
    ("pn", "soups", 16): "SLM-pn, soups for half of the groups",
    ("nopt", None, None): "SLM-nopt",
    ("llm", None, None): "LLM",
    ("lora", None, None): "LLM-lora, rank 64",
    ("d", None, None): "SLM-d, teacher LLM 6M",
    ("mix", None, 4): "SLM-mix, k = 4, frequent",
}


def of_size(tokens: int) -> str:
    body = []
    for method, label in LINES.items():
        cells = []
        for domain in FIVE:
            values = [perplexity(domain, seed, tokens, *method) for seed in (0, 1)]
            cells.append(shown([value for value in values if value], 1))
        if any(cell != "-" for cell in cells):
            body.append([label, *cells])
    return table([f"fine-tuned on {tokens // 1000}k tokens", *FIVE], body)


def five_64k() -> str:
    return of_size(64_000)


def five_16k() -> str:
    return of_size(16_000)


def compared(tokens: int, ours: tuple, theirs: tuple) -> list[str]:
    """Cells of a line: two methods, the mean difference of each domain, that of all; empty where no pair was done."""
    gains = {domain: pairs(tokens, ours, theirs, domain) for domain in FIVE}
    every = [gain for each in gains.values() for gain in each]
    if not every:
        return []
    cells = [percent(each) if each else "-" for each in gains.values()]
    lower = f"{percent(every)}, {sum(gain < 0 for gain in every)} of {len(every)} lower"
    return [LINES[ours], LINES[theirs], *cells, lower]


SLM, IS = ("slm", None, None), ("is", None, 64)


def best() -> str:
    """The recipe against plain SLM and the paper's SLM-is, at 6M tokens for the one domain."""
    body = []
    for tokens in (16_000, 64_000):
        for recipe in (method for method in LINES if method[1] not in (None, "soups")):
            for line in (compared(tokens, recipe, SLM), compared(tokens, recipe, IS)):
                if line:
                    body.append([f"{tokens // 1000}k", *line])
    return table(["domain set", "recipe", "against", *FIVE, "mean"], body)


def five_others() -> str:
    """The others of the paper, after 6M and 64k tokens."""
    llm, lora, d, mix = ("llm", None, None), ("lora", None, None), ("d", None, None), ("mix", None, 4)
    asked = [(("is", None, k), IS) for k in (16, 256, 1024, 4096)]
    asked += [(IS, SLM), (("pn", None, 16), SLM), (mix, SLM), (d, SLM), (d, IS), (lora, SLM), (llm, SLM), (lora, llm)]
    return table(["", "against", *FIVE, "mean"], [compared(64_000, *both) for both in asked])


def over_clusters() -> str:
    return product.over_clusters(records("2026-12-01-xeon-clusters.jsonl"))


def drawn() -> str:
    """What importance sampling drew for 64k tokens of a domain, seed 0; replay in fine-tuning changes none of it."""
    kept = ("is", "cis")
    drawn_once = (r for r in rows() if r["method"] in kept and "replayed" not in (r["variant"] or ""))
    return product.sampling([r for r in drawn_once if r["domain_tokens"] == 64_000 and not r["seed"]])


def five_costs() -> str:
    return product.costs(rows(), 64_000)

"""Tables of docs/scale.md, and of the faults of ranks in docs/reliability.md: what was measured, what follows of it."""

from __future__ import annotations

import math
from collections import Counter

from scripts.tables.pools import POOLS, learning
from scripts.tables.records import records, table

MEASURED = "2026-12-01-xeon-scale.jsonl"
LINKS = {"Thunderbolt 5, 80 Gbit/s": 10e9, "10 Gbit Ethernet": 1.25e9, "1 Gbit Ethernet": 0.125e9, "NVLink 4": 450e9}
"""Bytes a second in one direction, as their standards name them."""
SENT = {"SLM, 126M": 126e6, "LLM, 771M": 771e6, "SLM-pn, 16 groups a step": 84e6 + 8 * 42e6}
"""Numbers of the paper's models that a rank sums in a step: all parameters; of the network the shared ones, and dW of
five projected layers (8.39M each) for each of its groups."""
SIZE = 2
"""Bytes of a number with training.gradient_dtype=bfloat16."""
TOKENS, DOCUMENTS, TOKEN_BYTES, WINDOWS = 156e9, 364e6, 5.0, 1.2
"""Of C4: as its paper counts them; bytes of text a token with a vocabulary of 32,000, and windows of 1,024 tokens a
document, are assumed."""


def _found(what: str, **wanted) -> dict:
    (row,) = [r for r in records(MEASURED) if r["what"] == what and all(r[key] == of for key, of in wanted.items())]
    return row


def _short(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= (1 if unit == "s" else 2) * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{1000 * seconds:,.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:,.3g} us"


def ring() -> str:
    rows = [r for r in records(MEASURED) if r["what"] == "all_sum"]
    lines = [[f"{r['bytes']:,}", _short(r["seconds"]), f"{r['bytes'] / r['seconds'] / 1e9:.2f}"] for r in rows]
    return table(["bytes summed", "median", "GB/s"], lines)


def links() -> str:
    """Two ranks: a ring sends 2 (N - 1) / N of the gradient in each direction, for N = 2 once."""
    lines = []
    for name, speed in LINKS.items():
        seconds = [_short(SIZE * numbers / speed) for numbers in SENT.values()]
        lines.append([name, *seconds, *(f"{_even(speed, teraflops):,.0f}" for teraflops in (5, 50))])
    return table(["link", *SENT, "tokens a rank, 5 TFLOP/s", "50 TFLOP/s"], lines)


def _even(speed: float, teraflops: float) -> float:
    """Tokens of a rank in a step for which the gradient's way takes a tenth of the time: for each parameter 6 FLOPs a
    token and SIZE bytes."""
    return 10 * SIZE * teraflops * 1e12 / (6 * speed)


def trees() -> str:
    rows = [r for r in records(MEASURED) if r["what"] == "learn"]
    flat = {r["tree"][0]: r for r in rows if len(r["tree"]) == 1}
    lines = []
    for r in rows:
        k = 1
        for width in r["tree"]:
            k *= width
        beside = [r[key] / flat[k][key] - 1 for key in ("distance", "distance_held")]
        name = " x ".join(map(str, r["tree"]))
        gained = [f"{100 * each:+.1f} %" if len(r["tree"]) > 1 else "" for each in beside]
        lines.append([name, f"{r['points']:,}", f"{r['seconds']:.1f} s", f"{r['distance']:.4f}", *gained])
    return table(
        ["clusters", "windows", "learned in", "mean squared distance", "beside flat", "on other windows"], lines
    )


def c4() -> str:
    """Projected: the measured rates of these two cores, times what C4 has."""
    text, windows = TOKENS * TOKEN_BYTES, DOCUMENTS * WINDOWS
    lines = []

    def line(what: str, rate: float, amount: float, disk: float, held: float = 0) -> None:
        speed = f"{rate:,.0f} windows/s" if amount == windows else f"{rate / 1e6:,.2f} MB/s"
        memory = f"{held * windows / 1e9:,.0f} GB" if held else ""
        lines.append([what, speed, _short(amount / rate), f"{disk / 1e9:,.0f} GB" if disk else "", memory])

    for what, disk, name in (("read", 0, "reading, one core"), ("tokenise", 2 * TOKENS, "tokenising, one core")):
        row = _found(what)
        line(name, row["bytes"] / row["seconds"], text, disk)
    for row in (r for r in records(MEASURED) if r["what"] == "embed"):
        name = row["encoder"].rpartition("/")[2]
        line(f"embedding, {name}", row["bytes"] / row["seconds"], text, 2 * row["dims"] * windows)
    for tree in ([1024], [256, 256]):
        smaller, row = (r for r in records(POOLS) if r["tree"] == tree and r["windows"] >= 10**6)
        name = f"{math.prod(tree):,}" + (f" as {' x '.join(map(str, tree))}" if len(tree) > 1 else "")
        lines.append([f"learning {name} from a sample", "", _short(learning(row)), "", ""])
        held = 1e6 * (row["rss_mb"] - smaller["rss_mb"]) / (row["windows"] - smaller["windows"])
        line(f"assigning to {name}", row["windows"] / row["seconds_assigning"], windows, 16 * windows, held)
    return table(["", "rate of two cores", "C4 at that rate", "disk", "memory"], lines)


def rank_faults() -> str:
    rows = [r for r in records("2026-12-01-xeon-rank-faults.jsonl") if "result" in r]
    tried, held = Counter(r["kind"] for r in rows), Counter(r["kind"] for r in rows if r["result"] == "held")
    slowest = {kind: max(r.get("seconds", 0) for r in rows if r["kind"] == kind) for kind in tried}
    lines = [
        [kind, f"{held[kind]} of {count}", f"{slowest[kind]:.0f} s" if slowest.get(kind) else ""]
        for kind, count in tried.items()
    ]
    return table(["fault of one of two ranks", "held", "the other has ended after, at most"], lines)

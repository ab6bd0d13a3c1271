"""Tables of docs/scale.md, and of the faults of ranks in docs/reliability.md: what was measured, what follows of it."""

from __future__ import annotations

from collections import Counter

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


def assigning() -> str:
    rows = [r for r in records(MEASURED) if r["what"] == "assign"]
    names = list(dict.fromkeys(" x ".join(map(str, r["tree"])) for r in rows))
    lines = []
    for name in names:
        own = {r["windows"]: r for r in rows if " x ".join(map(str, r["tree"])) == name}
        cells = [_short(own[n]["seconds"]) if n in own else "" for n in (10**5, 10**6, 10**7)]
        lines.append([name, *cells])
    return table(["clusters", "100,000 windows", "a million", "ten million"], lines)


def c4() -> str:
    """Projected: the measured rates of these two cores, times what C4 has."""
    text, windows = TOKENS * TOKEN_BYTES, DOCUMENTS * WINDOWS
    lines = []

    def line(what: str, rate: float, unit: float, amount: float, disk: float) -> None:
        speed = f"{rate / 1e6:,.2f} MB/s" if unit == 1e6 else f"{rate:,.0f} windows/s"
        lines.append([what, speed, _short(amount / rate), f"{disk / 1e9:,.0f} GB"])

    tokenise = _found("tokenise")
    line("tokenising, one core", tokenise["bytes"] / tokenise["seconds"], 1e6, text, 2 * TOKENS)
    for row in (r for r in records(MEASURED) if r["what"] == "embed"):
        name = row["encoder"].rpartition("/")[2]
        line(f"embedding, {name}", row["bytes"] / row["seconds"], 1e6, text, 2 * row["dims"] * windows)
    for name, tree, times in (
        ("1,024, flat", [1024], 1),
        ("65,536 as 256 x 256", [64, 64], 4),
        ("65,536 as 16 x 16 x 16 x 16", [16, 16, 16], 4 / 3),
    ):
        seconds = _found("assign", tree=tree, windows=10**6)["seconds"] * times
        line(f"assigning to {name}", 1e6 / seconds, 1, windows, 16 * windows)
    return table(["", "rate of two cores", "C4 at that rate", "disk"], lines)


def rank_faults() -> str:
    rows = [r for r in records("2026-12-01-xeon-rank-faults.jsonl") if "result" in r]
    tried, held = Counter(r["kind"] for r in rows), Counter(r["kind"] for r in rows if r["result"] == "held")
    slowest = {kind: max(r.get("seconds", 0) for r in rows if r["kind"] == kind) for kind in tried}
    lines = [
        [kind, f"{held[kind]} of {count}", f"{slowest[kind]:.0f} s" if slowest.get(kind) else ""]
        for kind, count in tried.items()
    ]
    return table(["fault of one of two ranks", "held", "the other has ended after, at most"], lines)

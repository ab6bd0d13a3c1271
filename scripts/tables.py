"""Write the tables of the documents from their records: `python scripts/tables.py`; a test says when one differs.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is a function here, which makes its
lines from files of docs/records.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
DOMAINS = ("pubmed", "freelaw", "stackexchange")


def rendered(page: str) -> str:
    """A page with its tables as their records have them."""
    return PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}\n{place[3]}", page)


def records(name: str) -> list[dict]:
    text = (ROOT / "docs" / "records" / name).read_text()
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join(
            "|" + "|".join(cells) + "|" if line == 1 else "| " + " | ".join(cells) + " |"
            for line, cells in enumerate(map(list, lines))
        )
        .replace("|  |", "| |")
        .replace("|  |", "| |")
    )


def quickstart() -> str:
    found = [r for r in records("2026-11-28-xeon-quickstart-64.jsonl") if "the README's table" in r.get("note", "")]
    named = {
        ("slm", "none", None): "slm, none (random weights)",
        ("slm", "pretrained", None): "slm, pretrained (on the docstrings of all packages)",
        ("slm", "specialized", None): "slm, specialized (on 30,000 tokens of the standard library's)",
        ("is", "pretrained", None): "is, pretrained (on all of them, resampled to look like it)",
        ("is", "specialized", None): "is, specialized",
        ("pn", "pretrained", "frequent"): "pn, pretrained (4 experts at once), frequent",
        (
            "pn",
            "pretrained",
            "histogram",
        ): "pn, pretrained, histogram (the experts combined as the domain has their clusters)",
        ("pn", "specialized", "histogram"): "pn, specialized, histogram",
    }
    rows, shown = [], {(r["method"], r["stage"], r["select"]): r for r in found}
    best = min(shown[key]["perplexity"] for key in named)
    for key, name in named.items():
        record = shown[key]
        value = f"{record['perplexity']:.1f}"
        value = f"**{value}**" if record["perplexity"] == best else value
        rows.append([name, value, f"{record['tokens']:,}", f"{record['seconds']:.0f}"])
    head = ["model", "perplexity of unseen docstrings of the standard library", "training tokens", "seconds"]
    return table(head, rows)


def published() -> str:
    found = {(r["model"], r["domain"]): r for r in records("2026-11-28-xeon-published.jsonl")}
    rows = {
        "SmolLM2-135M-Instruct as published": ("SmolLM2-135M-Instruct", ""),
        "specialised": ("SmolLM2-135M-Instruct, specialised", "{}"),
        "adapters alone (`--lora 16`)": ("SmolLM2-135M-Instruct, LoRA of rank 16", "{}"),
        "laptop, 1.4M parameters, 3M tokens of generic text, 64k of the domain": (
            "laptop, from scratch, specialised", "11, on one core"
        ),
        "mini, 0.17M parameters, 10M and 64k": ("mini, from scratch, specialised", "9, on one core"),
    }  # fmt: skip

    def bits(model: str, domain: str) -> str:
        record = found.get((model, domain))
        if record is None:
            return ""
        value = f"{record['bits_per_byte']:.3f} ± {record['stderr_bits']:.3f}"
        return f"**{value}**" if model.endswith("Instruct, specialised") else value

    def minutes(model: str, form: str) -> str:
        if form != "{}":
            return form
        spent = [found[model, domain]["seconds"] for domain in ("pubmed", "stackexchange") if (model, domain) in found]
        return ", ".join(f"{seconds / 60:.0f}" for seconds in spent)

    return table(
        ["", "pubmed", "stackexchange", "minutes of training"],
        [
            [name, bits(model, "pubmed"), bits(model, "stackexchange"), minutes(model, form)]
            for name, (model, form) in rows.items()
        ],
    )


def quantised() -> str:
    found = records("2026-11-28-xeon-quantised.jsonl")
    rows = []
    for name, label in (("quickstart", "quickstart"), ("mini", "mini"), ("laptop", "laptop"), ("mac", "mac, paper")):
        sizes = [r for r in found if r["configuration"] == name and "parameters" in r]
        trained = {r["bits"]: r for r in found if r["configuration"] == name and "bits" in r}
        costs = ["not trained here", "", ""]
        if trained:
            costs = [f"{trained[4]['perplexity']:.2f}"]
            for bits, digits in ((4, 1), (8, 2)):
                more = trained[bits]["perplexity_quantised"] / trained[bits]["perplexity"] - 1
                costs.append(f"{trained[bits]['perplexity_quantised']:.2f} ({more:+.{digits}%})".replace("%", " %"))
        size = sizes[0]["parameters"] / 1e6
        shown = f"{size:.0f}M" if size > 10 else f"{size:.1f}M" if size > 1 else f"{size:.2f}M"
        rows.append([label, shown, ", ".join(f"{r['bits_per_weight']:.2f}" for r in sizes), *costs])
    head = [
        "configuration",
        "parameters",
        "4 bits: bits a weight, small and large",
        "perplexity, whole",
        "4 bits",
        "8 bits",
    ]
    return table(head, rows)


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


def both(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values) or "-"


def study_order() -> str:
    head = ["domain", "method", "30 tokens a parameter (1.8M)", "100 (6M)", "300 (18M)"]
    return table(
        head,
        [
            [domain, label, *(both(seeds(method, domain, budget, 64_000)) for budget in BUDGETS)]
            for domain in DOMAINS
            for method, label in MAIN.items()
        ],
    )


def percent(gains: list[float]) -> str:
    """The mean of differences of logarithms."""
    return f"{100 * math.expm1(sum(gains) / len(gains)):+.1f} %"


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
        [label, domain, *(both(seeds(method, domain, budget, size)) for size in (16_000, 64_000, 256_000))]
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
            *(both(seeds(method, domain, budget, 64_000)) for domain in ("pubmed", "stackexchange")),
        ]
        for label, method, budgets in methods
        for budget in budgets
    ]
    return table(["64k tokens", "pretraining", "pubmed", "stackexchange"], rows)


def miniature(name: str) -> list[dict]:
    return [r for r in records("2026-11-23-xeon-miniature.jsonl") if r["table"] == name]


def ordered(rows: Iterable[dict], *keys: str) -> list[tuple]:
    """The distinct values of keys, in the order of the record."""
    return list(dict.fromkeys(tuple(r[key] for key in keys) for r in rows))


def of(rows: Iterable[dict], **values: object) -> list[float]:
    """The perplexities of the rows that have these values, in the order of the record."""
    return [r["perplexity"] for r in rows if all(r[key] == value for key, value in values.items())]


LONG = (2_500_000, 5_000_000, 10_000_000, 20_000_000)


def shown(values: list[float], digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values) or "-"


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


TEXTS = {"generic": 1, "pubmed": 2, "wikipedia": 2}


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


WORK = {
    "slm_step": "SLM step, 16 x 256",
    "finetuning_step": "fine-tuning step, 8 x 256",
    "pn_step": "PN step, h = 32, 64 x 256 in 4 groups",
    "encoder": "all-MiniLM-L6-v2, texts of 100 words",
    "tokenising": "tokenising, one process",
}
PEERS = {
    None: "mlx-slm",
    "mlx-lm": "mlx-lm's trainer, our BLAS, allocator and compiler",
    "torch": "PyTorch, eager, our allocator settings",
    "torch, compiled": "PyTorch, `torch.compile`, the same",
    "mlx-lm as installed": "mlx-lm's trainer as installed (1 step)",
    "slm": "the SLM's step",
    "autodiff": "plain autodiff through T",
    "sentence-transformers": "sentence-transformers",
    "sentencepiece": "sentencepiece alone",
}


def beside_others() -> str:
    runs = [
        ("2026-11-27-xeon-mkl-step.json", "slm_step", "Intel Xeon, mkl"),
        ("2026-11-27-xeon-openblas.json", "slm_step", "Intel Xeon, OpenBLAS"),
        ("2026-11-27-xeon-openblas.json", "finetuning_step", "Intel Xeon, OpenBLAS"),
        ("2026-11-27-xeon-mkl-finetuning.json", "finetuning_step", "Intel Xeon, mkl"),
        *(
            ("2026-11-27-xeon-openblas.json", name, "Intel Xeon, OpenBLAS")
            for name in ("pn_step", "encoder", "tokenising")
        ),
    ]
    rows = []
    for file, name, processor in runs:
        for row in (r for r in records(file) if r["name"] == name):
            ours = row["peer"] is None
            low, high = (f"{value:.3g}" for value in row["quartiles_s"])
            megabytes = row["unit"] == "bytes/s"
            rate = f"{row['value'] / 1e6:.3g} MB/s" if megabytes else f"{row['value']:,.0f} {row['unit']}"
            rows.append(
                [
                    WORK[name] if ours else "",
                    processor if ours else "",
                    PEERS[row["peer"]],
                    f"{row['median_s']:.3g} s",
                    f"{low} - {high}",
                    rate,
                    f"{row['peak_bytes'] / 2**20:,.0f} MB" if row["peak_bytes"] else "",
                    f"{row['rss_bytes'] / 2**20:,.0f} MB",
                    "" if ours else f"{row['ratio']:.2f}x as fast",
                ]
            )
    head = ["", "processor, our BLAS", "", "median", "quartiles, s", "rate", "peak in MLX", "peak RSS", "mlx-slm is"]
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (
        quickstart,
        published,
        quantised,
        study_order,
        study_against,
        study_sizes,
        study_others,
        beside_others,
        miniature_order,
        miniature_generic,
        miniature_choice,
        miniature_helps,
        encoders_agreement,
        encoders_models,
    )
}


if __name__ == "__main__":
    for path in PAGES:
        text = path.read_text()
        if (now := rendered(text)) != text:
            path.write_text(now)
            print(f"written: {path.relative_to(ROOT)}")

"""Tables of models that the README and docs/ecosystem.md show."""

from __future__ import annotations

from scripts.tables.records import records, table


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

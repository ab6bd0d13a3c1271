"""Tables of docs/benchmarks.md."""

from __future__ import annotations

from scripts.tables.records import records, table

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


def parts() -> str:
    rows = []
    for row in records("2026-11-23-xeon-parts.json"):
        digits = 4 if row["median_s"] < 1 else 0
        low, high = (f"{1e3 * value:,.4g}" if digits else f"{1e3 * value:,.0f}" for value in row["quartiles_s"])
        median = f"{1e3 * row['median_s']:,.4g}" if digits else f"{1e3 * row['median_s']:,.0f}"
        rate, unit = row["value"], row["unit"]
        if unit == "bytes/s":
            shown_rate = f"{rate / 1e6:.3g} MB/s"
        elif unit == "points/s":
            shown_rate = f"{rate / 1e6:.3g} M points/s"
        else:
            shown_rate = f"{rate:,.0f} {unit}" if rate >= 10 else f"{rate:.3g} {unit}"
        rows.append(
            [
                f"`{row['name']}`",
                f"{median} ms",
                f"{low} - {high}",
                shown_rate,
                "" if row["tflops"] is None else f"{row['tflops']:.3f}",
                "" if row["gb_per_s"] is None else f"{row['gb_per_s']:.1f}",
                "" if row["of_peak"] is None else f"{row['of_peak']:.0%}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] >> 20:,} MB",
            ]
        )
    return table(["", "median", "quartiles, ms", "rate", "TFLOP/s", "GB/s", "of peak", "peak in MLX"], rows)


def machines() -> str:
    def span(values: list[float] | None, digits: str) -> str:
        return " - ".join(f"{value:{digits}}" for value in values or [])

    rows = [
        [
            *(row[key] or "" for key in ("machine", "memory", "system", "mlx", "dtype")),
            span(row["products"], ".2f"),
            span(row["reading"], "g"),
            *(
                "" if row[key] is None else f"{row[key]:,.0f} tokens/s"
                for key in ("slm_step", "pn_step", "finetuning_step", "decode")
            ),
        ]
        for row in records("machines.jsonl")
    ]
    head = ["machine", "memory", "system", "MLX, BLAS", "dtype", "products, TFLOP/s", "reading, GB/s", "SLM step"]
    return table([*head, "PN step, h = 32", "fine-tuning step", "decode"], rows)

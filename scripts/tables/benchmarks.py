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

"""How cost grows with the work, drawn: training with the model's shape, clustering, sampling and reading with the data.

    python -m benchmarks.scaling [CURVES] [--rounds 3] [--json FILE] [--figures DIR] [--draw FILE]

Each point is a benchmark of its own at a changed size, on MLX's default device. In the figures the dashed line is what
the cost would be if it were proportional, drawn through the last point. `--draw` draws a file that --json wrote.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import click

from benchmarks.run import measure, present_devices, print_machine, read_records, writable, write
from benchmarks.sizes import LAPTOP, Size

POWERS = (10_000, 100_000, 1_000_000, 10_000_000)
SMALL = replace(LAPTOP, clusters=64, embedding=64, context=16)
"""Of windows and embeddings, so that ten million of them fit."""


@dataclass
class Curve:
    """A benchmark at several sizes; `sizes` maps what changes to the size."""

    benchmark: str
    xlabel: str
    title: str
    sizes: dict[int, Size]


def shapes() -> dict[int, Size]:
    pairs = ((2, 128), (4, 256), (6, 384), (8, 512), (12, 640))
    sizes = [replace(LAPTOP, num_layers=layers, dims=dims, num_heads=dims // 64) for layers, dims in pairs]
    return {size.shape.num_parameters: size for size in sizes}


CURVES = {
    "parameters": Curve("slm_step", "parameters", "SLM step, 16 x 256 tokens", shapes()),
    "context": Curve(
        "slm_step",
        "context",
        "SLM step, 4,096 tokens in rows of that length",
        {n: replace(LAPTOP, context=n, rows=4096 // n) for n in (256, 512, 1024, 2048, 4096)},
    ),
    "vocabulary": Curve(
        "slm_step",
        "vocabulary",
        "SLM step, 16 x 256 tokens",
        {n: replace(LAPTOP, vocab_size=n) for n in (1024, 4096, 8192, 16_384, 32_768, 65_536)},
    ),
    "h": Curve(
        "pn_step",
        "h",
        "PN step, 16,384 tokens in 4 groups",
        {n: replace(LAPTOP, h=n) for n in (4, 8, 16, 32, 64)},
    ),
    "kmeans-windows": Curve(
        "kmeans",
        "windows",
        "k-means, 10 iterations, 64 dimensions, k = 64",
        {n: replace(SMALL, points=n) for n in POWERS},
    ),
    "kmeans-k": Curve(
        "kmeans",
        "k",
        "k-means, 10 iterations, 100,000 windows",
        {n: replace(SMALL, points=100_000, clusters=n) for n in (16, 64, 256, 1024, 4096)},
    ),
    "sampler-windows": Curve(
        "row_loading",
        "windows",
        "sampler, 20 steps of 16 rows, k = 64",
        {n: replace(SMALL, points=n) for n in POWERS},
    ),
    "sampler-k": Curve(
        "row_loading",
        "k",
        "sampler, 20 steps of 16 rows, 100,000 windows",
        {n: replace(SMALL, points=100_000, clusters=n) for n in (16, 64, 256, 1024, 4096)},
    ),
    "opening": Curve(
        "opening",
        "windows",
        "opening a store and its first batch",
        {n: replace(LAPTOP, windows=n) for n in POWERS},
    ),
    "preparing": Curve(
        "preparing",
        "bytes of text",
        "prepare: tokenizer, tokens, windows",
        {n: replace(LAPTOP, text=n) for n in (1_000_000, 4_000_000, 16_000_000, 64_000_000)},
    ),
}
FIGURES = {
    "scaling-training": ("parameters", "context", "vocabulary", "h"),
    "scaling-data": ("kmeans-windows", "kmeans-k", "sampler-windows", "sampler-k", "opening", "preparing"),
}


def growth(rows: list[dict]) -> list[float]:
    """Between neighbours, the exponent of the cost: 1 is proportional, 0 constant."""
    return [math.log(b["median_s"] / a["median_s"]) / math.log(b["x"] / a["x"]) for a, b in pairwise(rows)]


def draw(rows: list[dict], directory: Path) -> list[Path]:
    """Write a figure for each group of curves that was measured; returns their paths."""
    from matplotlib.ticker import EngFormatter, NullLocator

    from mlx_slm.figures import new_figure, save_figure

    written = []
    for name, curves in FIGURES.items():
        there = [curve for curve in curves if any(row["curve"] == curve for row in rows)]
        if not there:
            continue
        columns = min(3, len(there)) if len(there) != 4 else 2
        lines = -(-len(there) // columns)
        figure = new_figure(4.2 * columns, 3.4 * lines)
        for axes, curve in zip(figure.subplots(lines, columns, squeeze=False).flat, there, strict=False):
            own = sorted((row for row in rows if row["curve"] == curve), key=lambda row: row["x"])
            xs, ys = [row["x"] for row in own], [row["median_s"] for row in own]
            axes.plot(xs, [ys[-1] * x / xs[-1] for x in xs], "--", color="0.7", label="proportional")
            axes.set_ylim(min(ys) / 2, 2 * max(ys))
            errors = [[y - row["quartiles_s"][0] for y, row in zip(ys, own, strict=True)]]
            errors.append([row["quartiles_s"][1] - y for y, row in zip(ys, own, strict=True)])
            axes.errorbar(xs, ys, errors, marker="o", capsize=3, color="C0", label="median, quartiles")
            axes.set(xscale="log", yscale="log", xlabel=CURVES[curve].xlabel, ylabel="seconds")
            axes.set_title(CURVES[curve].title, fontsize=9)
            axes.set_xticks(xs, [EngFormatter(places=1 if x % 1000 and x > 10_000 else 0, sep="")(x) for x in xs])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if max(ys) < 4 * min(ys) else "")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        figure.suptitle(own[0]["device"], fontsize=10)
        written.append(save_figure(figure, directory / f"{name}.png"))
    return written


@click.command(help=__doc__)
@click.argument("curves", nargs=-1)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns at each point.")
@click.option("--json", "json_file", callback=writable, help="Write the records to this file.")
@click.option("--figures", type=click.Path(file_okay=False, path_type=Path), help="Draw figures in this directory.")
@click.option("--draw", "drawn", type=click.Path(exists=True, dir_okay=False), help="Measure nothing, draw this file.")
def main(curves, rounds, json_file, figures, drawn) -> None:
    if unknown := [name for name in curves if name not in CURVES]:
        raise click.UsageError(f"no curve {unknown[0]!r}; there are: {', '.join(CURVES)}")
    rows = read_records(drawn, {"curve", "x", "median_s", "quartiles_s", "device"})
    if not drawn:
        print_machine()
        for name in curves or CURVES:
            curve, own = CURVES[name], []
            print(f"\n{name}: {curve.title}")
            for x, size in curve.sizes.items():
                for row in measure(curve.benchmark, size, present_devices()[:1], rounds):
                    own.append({"curve": name, "x": x} | row)
                    exponent = f"  exponent {growth(own)[-1]:.2f}" if len(own) > 1 else ""
                    print(f"{curve.xlabel} {x:>12,}{row['median_s']:>10.4f} s{exponent}", flush=True)
            rows += own
            write(json_file, rows)
    if figures or drawn:
        for path in draw(rows, figures or Path(".")):
            print(path)


if __name__ == "__main__":
    main()

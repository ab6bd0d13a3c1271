"""Metal (or CUDA) against the CPU, and both against what a user would take instead: parts of the work and all of it.

    python -m benchmarks [NAMES] [--size tiny|laptop|paper] [--devices cpu,gpu] [--peers] [--json FILE] [--compare FILE]

Each side works in a process of its own; they take turns and never run at the same time. `first is`: how many times as
fast our code on the first device is. `of peak`: of what `matmul` and `read` reach on the same device in the same run;
what fits a cache can have more. A file that --json wrote can be given to --compare after a change.
"""

from __future__ import annotations

import subprocess
import sys

import click

from benchmarks.run import (
    BENCHMARKS,
    PEAKS,
    add_peaks,
    begin,
    measure,
    present_devices,
    read_records,
    show,
    writable,
    write,
)
from benchmarks.sizes import SIZES
from benchmarks.texts import CACHE


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--size", type=click.Choice(list(SIZES)), default="laptop", show_default=True)
@click.option("--devices", help="cpu, gpu or both, the first being what ratios are of. [default: all there are]")
@click.option("--peers", is_flag=True, help="Also mlx-lm, PyTorch and others, those that are installed.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each side.")
@click.option("--json", "json_file", callback=writable, help="Write the records to this file.")
@click.option("--compare", type=click.Path(exists=True, dir_okay=False), help="An older such file.")
def main(names, size, devices, peers, rounds, json_file, compare) -> None:
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise click.UsageError(f"no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")
    chosen = devices.split(",") if devices else present_devices()
    if missing := [device for device in chosen if device not in present_devices()]:
        raise click.UsageError(
            f"--devices {missing[0]}: MLX has no such device here; there are: {', '.join(present_devices())}"
        )
    with_older = read_records(compare, {"name", "size", "device", "peer", "median_s"})
    if "kmeans" in names and SIZES[size].embedding == 384:
        subprocess.run([sys.executable, "-c", "import benchmarks.texts as t; t.make_embeddings()"], check=True)
    wanted = [name for name in BENCHMARKS if not names or name in names or name in PEAKS]
    if not names and not CACHE.exists() and SIZES[size].embedding == 384:
        wanted.remove("kmeans")
        print("kmeans is left out: name it, and embeddings of 50,000 texts are made first (half an hour on two cores)")
    rows: list[dict] = []
    begin()
    for name in wanted:
        own = measure(name, SIZES[size], chosen, rounds, peers)
        rows += own
        add_peaks(rows)
        show(own, with_older)
        write(json_file, rows)


if __name__ == "__main__":
    main()

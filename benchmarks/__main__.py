"""Metal (or CUDA) against the CPU: the parts of training and the whole of it, the same code on each device.

    python -m benchmarks [NAMES] [--size tiny|laptop|paper] [--devices cpu,gpu] [--json FILE] [--compare FILE]

Each device works in a process of its own; they take turns and never run at the same time. `ratio` is how many times as
fast the first device is. `of peak`: of what `matmul` and `read` reach on the same device in the same run;
what fits a cache can have more.
"""

from __future__ import annotations

import json

import click

from benchmarks.devices import BENCHMARKS, PEAKS, add_peaks, measure, present_devices, show
from benchmarks.harness import print_machine, write
from benchmarks.sizes import SIZES


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--size", type=click.Choice(list(SIZES)), default="laptop", show_default=True)
@click.option("--devices", help="cpu, gpu or both, the first being what ratios are of. [default: all there are]")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each device.")
@click.option("--json", "json_file", help="Write the records to this file.")
@click.option("--compare", type=click.Path(exists=True), help="An older such file.")
def main(names, size, devices, rounds, json_file, compare) -> None:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise click.UsageError(f"no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")
    chosen = devices.split(",") if devices else present_devices()
    if missing := [device for device in chosen if device not in present_devices()]:
        raise click.UsageError(
            f"--devices {missing[0]}: MLX has no such device here; there are: {', '.join(present_devices())}"
        )
    print_machine()
    wanted = [name for name in BENCHMARKS if not names or name in names or name in PEAKS]
    rows = []
    for name in wanted:
        rows += measure(name, SIZES[size], chosen, rounds)
    add_peaks(rows)
    with_older = json.load(open(compare)) if compare else []
    show(rows, with_older)
    write(json_file, rows)


if __name__ == "__main__":
    main()

"""One benchmark: our code on each device and its peers in turns; the records and what was achieved."""

from __future__ import annotations

import functools
import json
import statistics

import click

from benchmarks.harness import play
from benchmarks.micro import MICRO
from benchmarks.peers import OWN_BLAS, STOCK, facts_of, peers_of
from benchmarks.sizes import Size
from benchmarks.texts import TEXTS
from benchmarks.whole import WHOLE

BENCHMARKS = MICRO | WHOLE | TEXTS
PEAKS = ("matmul", "read")


def run_case(name: str, device: str, size: Size, turn) -> None:
    """Our side of a benchmark on one device."""
    import mlx.core as mx

    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
    case = BENCHMARKS[name](size)
    turn.serve(case, facts_of(case))


def present_devices() -> list[str]:
    """`gpu` and `cpu`, or `cpu` alone."""
    from mlx_slm.machine import runtime

    return ["cpu"] if runtime.backend() == "cpu" else ["gpu", "cpu"]


def measure(name: str, size: Size, devices: list[str], rounds: int, peers: bool = False) -> list[dict]:
    """A record for each device and peer; `ratio`: how many times as fast the first device is.

    Records of peers have the FLOPs and bytes of the same work in ours.
    """
    sides = {device: functools.partial(run_case, name, device) for device in devices}
    found, facts = play(sides | (peers_of(name, devices[0]) if peers else {}), size, rounds, STOCK, OWN_BLAS)
    if devices[0] not in found:
        return []
    ours, rows = facts[devices[0]], []
    fastest = statistics.median(turn[0] for turn in found[devices[0]])
    for side, turns in found.items():
        times = [turn[0] for turn in turns]
        low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        own, is_peer = facts[side], side not in devices
        rate = lambda work, median=median: work / median / 1e9 if work else None  # noqa: E731
        flops = rate(ours["flops"])
        rows.append(
            {
                "name": name,
                "size": ours["size"] or size.name,
                "device": own["device"],
                "backend": None if is_peer else side,
                "dtype": own["dtype"],
                "median_s": median,
                "quartiles_s": [low, high],
                "value": own["amount"] / median,
                "unit": own["unit"],
                "peer": side if is_peer else None,
                "ratio": median / fastest if len(found) > 1 else None,
                "tflops": flops and flops / 1e3,
                "gb_per_s": rate(ours["bytes"]),
                "peak_bytes": turns[-1][1],
                "rss_bytes": turns[-1][2],
            }
        )
    return rows


def add_peaks(rows: list[dict]) -> None:
    """Add `of_peak`: the larger of the shares of the device's measured rates of products and of reading."""
    for row in rows:
        backend = row["backend"] or rows[0]["backend"]
        peaks = {one["name"]: one for one in rows if one["backend"] == backend and one["name"] in PEAKS}
        shares = []
        if row["tflops"] and "matmul" in peaks:
            shares.append(row["tflops"] / peaks["matmul"]["tflops"])
        if row["gb_per_s"] and "read" in peaks:
            shares.append(row["gb_per_s"] / peaks["read"]["gb_per_s"])
        row["of_peak"] = max(shares, default=None)


def key_of(row: dict) -> tuple:
    return row["name"], row["size"], row["device"], row["peer"]


def begin() -> None:
    """Print the machine and the names of the columns."""
    print_machine()
    print(f"{'benchmark':<18}{'on':<22}{'median':>12}{'quartiles, ms':>20}{'rate':>22}", end="")
    print(f"{'TFLOP/s':>9}{'GB/s':>7}{'of peak':>9}{'MLX peak':>10}{'first is':>10}{'before':>9}")


def show(rows: list[dict], before: list[dict]) -> None:
    """Print records; with those of an older file, how many times as fast each is now."""
    older = {key_of(row): row["median_s"] for row in before}
    for row in rows:
        low, high = (1e3 * value for value in row["quartiles_s"])
        old = older.get(key_of(row))
        texts = [
            row["tflops"] and f"{row['tflops']:.3f}",
            row["gb_per_s"] and f"{row['gb_per_s']:.1f}",
            row["of_peak"] and f"{row['of_peak']:.0%}",
            row["peak_bytes"] is not None and f"{row['peak_bytes'] / 2**20:,.0f} MB",
            row["ratio"] and f"{row['ratio']:.2f}x",
            old and f"{old / row['median_s']:.2f}x",
        ]
        columns = "".join(f"{text or '':>{width}}" for text, width in zip(texts, (9, 7, 9, 10, 10, 9), strict=True))
        print(
            f"{row['name']:<18}{row['peer'] or row['backend']:<22}{1e3 * row['median_s']:>9.2f} ms"
            f"{f'{low:.2f} - {high:.2f}':>20}{row['value']:>12,.0f} {row['unit']:<9}{columns}",
            flush=True,
        )


def writable(context, parameter, path: str | None) -> str | None:
    """For click: a file that can be written, found out before anything is measured."""
    try:
        if path:
            open(path, "a").close()
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}") from None
    return path


def read_records(path: str | None, keys: set[str]) -> list[dict]:
    """Records that --json wrote; raises click.UsageError for anything else."""
    try:
        rows = json.load(open(path)) if path else []
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= set(row) for row in rows):
        raise click.UsageError(f"{path}: not a file that --json of this command wrote")
    return rows


def write(path: str | None, rows: list[dict]) -> None:
    """Write all records to a JSON file, if one is named."""
    if path:
        with open(path, "w") as file:
            json.dump(rows, file, indent=1)


def print_machine() -> None:
    """Chip, memory, operating system, backend, its speed, versions and BLAS, in three lines."""
    import platform

    from mlx_slm.machine import runtime

    this, system = runtime.describe(), platform.platform(terse=True)
    print(f"{this['device']}, {this['memory_gb']} GB, {system}, {this['backend']}, {this['gflops']} GFLOP/s")
    print(", ".join(f"{name} {version}" for name, version in this["versions"].items()))
    if this["blas"]:
        print(f"BLAS: {this['blas']}")

"""The same benchmark on each device: a process each, taking turns, and what it achieved."""

from __future__ import annotations

import functools

from benchmarks.harness import play, records
from benchmarks.micro import MICRO
from benchmarks.sizes import Size
from benchmarks.whole import WHOLE

BENCHMARKS = MICRO | WHOLE
PEAKS = ("matmul", "read")


def run_case(name: str, device: str, size: Size, turn) -> None:
    """One device's side of a benchmark."""
    import mlx.core as mx

    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
    from mlx_slm import runtime

    case = BENCHMARKS[name](size)
    facts = {key: getattr(case, key) for key in ("amount", "unit", "flops", "bytes")}
    facts |= {"device": runtime.device_name(), "dtype": str(runtime.compute_dtype()).removeprefix("mlx.core.")}
    turn.serve(case.work, peak=mx.get_peak_memory, facts=facts)


def present_devices() -> list[str]:
    """`gpu` and `cpu`, or `cpu` alone."""
    from mlx_slm import runtime

    return ["cpu"] if runtime.backend() == "cpu" else ["gpu", "cpu"]


def measure(name: str, size: Size, devices: list[str], rounds: int) -> list[dict]:
    """A record for each device (DESIGN, "The commands"), with what it achieved."""
    runners = {device: functools.partial(run_case, name, device) for device in devices}
    facts: dict[str, dict] = {}
    found = play(runners, size, rounds, facts=facts)
    rows = []
    for device, row in zip(found, records(name, size.name, found, devices[0], 1.0, ""), strict=True):
        own = facts[device]
        row |= {"value": own["amount"] / row["median_s"], **{key: own[key] for key in ("unit", "device", "dtype")}}
        row |= {"backend": device, "peer": None, "ratio": row["ratio"] if len(found) > 1 else None}
        row["tflops"] = own["flops"] / row["median_s"] / 1e12 if own["flops"] else None
        row["gb_per_s"] = own["bytes"] / row["median_s"] / 1e9 if own["bytes"] else None
        rows.append(row)
    return rows


def add_peaks(rows: list[dict]) -> None:
    """Add `of_peak`: the larger of the shares of the device's measured rates of products and of reading."""
    for row in rows:
        peaks = {one["name"]: one for one in rows if one["backend"] == row["backend"] and one["name"] in PEAKS}
        shares = []
        if row["tflops"] and "matmul" in peaks:
            shares.append(row["tflops"] / peaks["matmul"]["tflops"])
        if row["gb_per_s"] and "read" in peaks:
            shares.append(row["gb_per_s"] / peaks["read"]["gb_per_s"])
        row["of_peak"] = max(shares, default=None)


def show(rows: list[dict], before: list[dict]) -> None:
    """Print all records; with those of an older file, how many times as fast each is now."""
    older = {(row["name"], row["size"], row["device"]): row["median_s"] for row in before}
    print(f"{'benchmark':<20}{'on':<5}{'median':>12}{'quartiles, ms':>20}{'rate':>22}", end="")
    print(f"{'TFLOP/s':>9}{'GB/s':>8}{'of peak':>9}{'first is':>10}{'before':>9}")
    for row in rows:
        low, high = (1e3 * value for value in row["quartiles_s"])
        old = older.get((row["name"], row["size"], row["device"]))
        achieved = [
            f"{row['tflops']:.3f}" if row["tflops"] else "",
            f"{row['gb_per_s']:.1f}" if row["gb_per_s"] else "",
            f"{row['of_peak']:.0%}" if row["of_peak"] else "",
        ]
        ratios = [f"{row['ratio']:.2f}x" if row["ratio"] else "", f"{old / row['median_s']:.2f}x" if old else ""]
        print(
            f"{row['name']:<20}{row['backend']:<5}{1e3 * row['median_s']:>9.2f} ms{f'{low:.2f} - {high:.2f}':>20}"
            f"{row['value']:>12,.0f} {row['unit']:<9}{achieved[0]:>9}{achieved[1]:>8}{achieved[2]:>9}"
            f"{ratios[0]:>10}{ratios[1]:>9}"
        )

"""Sides of a benchmark take turns: each in a process of its own, never two at the same time."""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable


class Turn:
    """One side's end of the pipe: it works only when it is told to."""

    def __init__(self, pipe):
        self.pipe = pipe

    def ready(self, facts: dict | None = None) -> None:
        self.pipe.send(facts or {})

    def wait(self) -> bool:
        return self.pipe.recv()

    def report(self, seconds: float, peak: int | None) -> None:
        self.pipe.send((seconds, peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))

    def serve(
        self,
        work: Callable[[], None],
        parts: int = 1,
        peak: Callable[[], int | None] = lambda: None,
        facts: dict | None = None,
    ) -> None:
        """Call `work` at each turn and report its seconds divided by `parts`, and the allocator's peak in bytes.

        `facts`: what the side has to say about itself before its first turn.
        """
        self.ready(facts)
        while self.wait():
            start = time.perf_counter()
            work()
            self.report((time.perf_counter() - start) / parts, peak())


def _child(runner, options, pipe, stock: bool) -> None:
    if stock:
        import warnings

        import mlx.core  # noqa: F401  (before mlx_slm, which then cannot load a BLAS)

        warnings.simplefilter("ignore")
    import mlx_slm  # noqa: F401

    runner(options, Turn(pipe))


def play(
    runners: dict[str, Callable],
    options,
    rounds: int,
    stock: str | None = None,
    stock_rounds: int = 2,
    facts: dict[str, dict] | None = None,
) -> dict[str, list]:
    """Return (seconds, peak bytes or None, RSS bytes) of each turn of each side, the first turn left out.

    A side whose packages are missing is left out. `stock` names one that runs without a preloaded BLAS, a few times.
    `facts` is filled with what each side says about itself.
    """
    context = multiprocessing.get_context("spawn")
    sides = {}
    for side, runner in runners.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(runner, options, theirs, side == stock), daemon=True)
        process.start()
        theirs.close()
        try:
            said = ours.recv()
            sides[side] = ours
            if facts is not None:
                facts[side] = said
        except EOFError:
            print(f"{side}: not available here, left out")
    found: dict[str, list] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side, pipe in sides.items():
            if side == stock and turn > stock_rounds:
                continue
            pipe.send(True)
            result = pipe.recv()
            if turn:  # the first turn compiles and warms up
                found[side].append(result)
    for pipe in sides.values():
        pipe.send(False)
    return found


def records(name: str, size: str, found: dict[str, list], ours: str, amount: float, unit: str) -> list[dict]:
    """One record per side: `value` is amount per median second, `ratio` how many times as fast `ours` is."""
    from mlx_slm import runtime

    medians = {side: statistics.median(row[0] for row in rows) for side, rows in found.items()}
    result = []
    for side, rows in found.items():
        times = [row[0] for row in rows]
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
        result.append(
            {
                "name": name,
                "size": size,
                "device": runtime.device_name(),
                "dtype": "float32",
                "median_s": medians[side],
                "quartiles_s": [low, high],
                "value": amount / medians[side],
                "unit": unit,
                "peer": None if side == ours else side,
                "ratio": medians[side] / medians[ours] if ours in medians else None,
                "peak_bytes": rows[-1][1],
                "rss_bytes": rows[-1][2],
            }
        )
    return result


def show(rows: list[dict], ours: str) -> None:
    """Print the records of one benchmark as a table."""
    unit = rows[0]["unit"]
    print(f"\n{rows[0]['name']}, {rows[0]['size']}")
    print(f"{'side':<22}{unit:>14}{'quartiles, s':>20}{'MLX peak':>12}{'RSS peak':>12}{'ours is':>10}")
    for row in rows:
        peak = f"{row['peak_bytes'] / 2**20:,.0f} MB" if row["peak_bytes"] else "-"
        quartiles = "{:.3f} - {:.3f}".format(*row["quartiles_s"])
        ratio = f"{row['ratio']:.2f}x" if row["ratio"] else ""
        print(
            f"{row['peer'] or ours:<22}{row['value']:>14,.1f}{quartiles:>20}{peak:>12}"
            f"{row['rss_bytes'] / 2**20:>9,.0f} MB{ratio:>10}"
        )


def write(path: str | None, rows: list[dict]) -> None:
    """Write all records to a JSON file, if one is named."""
    if path:
        with open(path, "w") as file:
            json.dump(rows, file, indent=1)


def print_machine() -> None:
    """Device, memory, backend, BLAS speed and versions, in two lines."""
    from mlx_slm import runtime

    machine = runtime.describe()
    print(f"{machine['device']}, {machine['memory_gb']} GB, {machine['backend']}, {machine['gflops']} GFLOP/s (1024^3)")
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))

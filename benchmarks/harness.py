"""Sides of a benchmark take turns: each in a process of its own, never two at the same time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import ENVIRONMENT
from benchmarks.case import Case


class Turn:
    """One side's end of the pipe: it works only when it is told to."""

    def __init__(self, pipe):
        self.pipe = pipe

    def ready(self, facts: dict) -> None:
        self.pipe.send(facts)

    def wait(self) -> bool:
        return self.pipe.recv()

    def report(self, seconds: float, peak: int | None) -> None:
        self.pipe.send((seconds, peak, peak_rss()))

    def serve(self, case: Case, facts: dict) -> None:
        """Do the work of a case at each turn; report its seconds and the peak of memory in bytes.

        `facts`: what the side has to say about itself before its first turn.
        """
        self.ready(facts)
        while self.wait():
            start = time.perf_counter()
            own = case.work()
            self.report(own if case.timed else time.perf_counter() - start, case.memory())


def peak_rss() -> int:
    """Peak resident bytes of this process; on Linux `ru_maxrss` would be the parent's where that had more."""
    status = Path("/proc/self/status")
    if status.exists():
        found = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(found.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _child(runner, size, pipe, stock: dict | None, own_blas: bool) -> None:
    import signal
    import warnings

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its daemons ...
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # ... and they remove their temporary files
    if stock is not None:
        scratch = tempfile.TemporaryDirectory()  # MLX keeps compiled loops there, and ours are made with other flags
        os.environ.clear()
        os.environ.update(stock | {"TMPDIR": scratch.name})
        import mlx.core  # noqa: F401  (before mlx_slm, which then cannot load a BLAS)

        warnings.simplefilter("ignore")
    if own_blas:
        os.environ["MLX_SLM_BLAS"] = "none"
    import mlx_slm  # noqa: F401

    try:
        runner(size, Turn(pipe))
    except ImportError as error:
        pipe.send(str(error))


def play(
    runners: dict[str, Callable], size, rounds: int, stock: str | None = None, own_blas: frozenset[str] = frozenset()
) -> tuple[dict[str, list[tuple[float, int | None, int]]], dict[str, dict]]:
    """Return ((seconds, peak bytes or None, RSS bytes) of each turn of each side, the first turn left out; its facts).

    A side whose packages are missing is left out. `stock` names one that runs without anything of ours, and one turn
    only; `own_blas` those that bring a BLAS of their own, in front of which ours would be in the way.
    """
    context = multiprocessing.get_context("spawn")
    sides, facts, processes = {}, {}, []
    for side, runner in runners.items():
        ours, theirs = context.Pipe()
        arguments = (runner, size, theirs, ENVIRONMENT if side == stock else None, side in own_blas)
        process = context.Process(target=_child, args=arguments, daemon=True)
        process.start()
        processes.append(process)
        theirs.close()
        try:
            said = ours.recv()
        except EOFError:
            said = "its process ended, see above"
        if isinstance(said, str):
            print(f"{side} is left out: {said}")
        else:
            sides[side], facts[side] = ours, said
    found: dict[str, list] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side, pipe in sides.items():
            if side not in found or (side == stock and turn > 1):
                continue
            try:
                pipe.send(True)
                result = pipe.recv()
            except (EOFError, OSError):
                print(f"{side} is left out: it failed in turn {turn}, see above")
                found.pop(side, None)
                continue
            if turn and side in found:  # the first turn compiles and warms up
                found[side].append(result)
    for pipe in sides.values():
        with contextlib.suppress(OSError):
            pipe.send(False)
    for process in processes:
        process.join(timeout=10)
    return found, facts

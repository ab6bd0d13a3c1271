"""A study, cell by cell: a row is kept for each, so that a killed study goes on, and several processes can share it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mlx_slm.errors import Busy, SlmError
from mlx_slm.machine import runtime
from mlx_slm.machine.runtime import likely_flops
from mlx_slm.methods import find_method
from mlx_slm.methods.base import Models
from mlx_slm.report import Agreed, duration, require_agreement
from mlx_slm.storage.records import append_json, read_json_lines
from mlx_slm.study.cell import Study
from mlx_slm.study.grid import Cell

PATIENCE = 2.0
"""Seconds until cells that other processes hold are asked for again."""
CHECKPOINTS = 4 + 3 * 3 * 4
"""Bytes that a fine-tuned parameter takes: the model, and three checkpoints with two moments."""


def run_study(study: Study, jobs: int = 1, command: list[str] | None = None) -> list[dict]:
    """Do every cell that is not done; returns all rows, in the order of the grid.

    With several `jobs` as many processes run `command`, this study with one job, each on its part of the cores.
    """
    if jobs > 1 and runtime.on_gpu():
        raise SlmError(
            f"--jobs {jobs}: there is one GPU, and each process would take its memory as if alone: leave --jobs out"
        )
    study.prepare()
    study.file.parent.mkdir(parents=True, exist_ok=True)
    if todo := _left(study):
        _announce(study, todo)
    if jobs > 1 and todo:
        _share(study, min(jobs, len(todo)), command or [])
    else:
        _work(study)
    rows = read_rows(study)
    return [as_now(rows[cell.name]) for cell in study.cells]


def read_rows(study: Study) -> dict[str, dict]:
    """The rows of a study that hold for its settings, by cell; a line that a kill cut off is left out."""
    rows: dict[str, dict] = {}
    for row in read_json_lines(study.file, keys=("cell", "settings")):
        if study.settings.get(row["cell"]) == row["settings"]:
            rows[row["cell"]] = row
    return rows


def as_now(row: dict) -> dict:
    """A row with what was added since: variants, and the part of a pretraining that domains share."""
    nothing = {"tokens": 0, "seconds": 0, "flops": 0}
    pretraining = row["pretraining"] or nothing
    shared = nothing if find_method(row["method"]).is_per_domain else pretraining
    return {"curve": [], "variant": None, "shared_budget": None, "shared": shared} | row | {"pretraining": pretraining}


def _left(study: Study) -> list[Cell]:
    """The cells without a row."""
    done = read_rows(study)
    return [cell for cell in study.cells if cell.name not in done]


def _work(study: Study) -> None:
    """Do the cells that nobody else does, until all are done."""
    numbers = {cell: number for number, cell in enumerate(study.cells)}
    with open(study.file.with_suffix(".lock"), "a") as locks:
        while left := _left(study):
            did_some = False
            for cell in left:
                with _claimed(locks, numbers[cell]) as mine, contextlib.suppress(Busy):
                    if mine and cell.name not in read_rows(study):
                        row = study.work(cell)
                        append_json(study.file, row)
                        _tell(study, row, len(read_rows(study)))
                        did_some = True
            if not did_some:
                time.sleep(PATIENCE)


@contextlib.contextmanager
def _claimed(locks: TextIO, number: int) -> Iterator[bool]:
    """Whether this process may do a cell: it holds one byte of the lock file meanwhile."""
    try:
        fcntl.lockf(locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.lockf(locks, fcntl.LOCK_UN, 1, number)


def _announce(study: Study, todo: list[Cell]) -> None:
    """Say what it takes about; ask, once, where the pretrainings alone are over ten minutes."""
    config, report = study.config, study.report
    models = Models.of(config)
    runs = {cell.trunk(method): find_method(method) for cell in todo for method in cell.pretrained}
    flops = sum(study.budgets[name][-1] * method.shape(models).flops_per_token for name, method in runs.items())
    disk = sum(CHECKPOINTS * find_method(cell.method).shape(models).num_parameters for cell in todo)
    report.line(
        f"{len(todo)} of {len(study.cells)} cells to do: {len(runs)} pretrainings, where they are not done, of about "
        f"{duration(flops / likely_flops())} on this machine, and {len(todo)} fine-tunings; {disk / 1e9:.1f} GB of "
        "models and checkpoints"
    )
    require_agreement(report, flops / likely_flops())
    study.report = Agreed(report)


def _share(study: Study, jobs: int, command: list[str]) -> None:
    """Let `jobs` processes do the cells, each on its part of the cores, and tell of each row that comes in."""
    workers: dict[Path, subprocess.Popen] = {}
    told = set(read_rows(study))
    ended: list[Path] = []
    try:
        for number, cores in enumerate(_parts_of_cores(jobs), 1):
            path = study.file.with_name(f"{study.name}-job{number}.log")
            with open(path, "w") as output, _on_cores(cores):
                workers[path] = subprocess.Popen(
                    [sys.executable, "-m", "mlx_slm", *command],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | runtime.same_blas() | {runtime.PARENT: str(os.getpid())},
                )
        study.report.line(f"{jobs} jobs; what each does: {', '.join(map(str, workers))}")
        working = True
        while working:
            working = any(worker.poll() is None for worker in workers.values())
            rows = read_rows(study)
            for name in [name for name in rows if name not in told]:
                told.add(name)
                _tell(study, rows[name], len(told))
            for log in [log for log, worker in workers.items() if worker.poll() and log not in ended]:
                study.report.warn(f"a job ended before its time ({_last_line(log)})")
                ended.append(log)
            time.sleep(PATIENCE if working else 0)
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.wait()
    if missing := len(_left(study)):
        log = next(iter(ended), next(iter(workers)))
        raise SlmError(f"{missing} cells are not done ({_last_line(log)}); the same command goes on from there")


def _tell(study: Study, row: dict, done: int) -> None:
    perplexity = row["specialized"]["perplexity"]
    study.report.line(f"{done} of {len(study.cells)}: {row['cell']}: perplexity {perplexity:.2f}")


def _last_line(log: Path) -> str:
    return f"{log}: {(log.read_text(errors='replace').strip().splitlines() or ['it was killed'])[-1]}"


def _parts_of_cores(jobs: int) -> list[set[int] | None]:
    """Cores for each job; None where the system does not say, or has fewer cores than jobs."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < jobs:
        return [None] * jobs
    return [set(cores[number::jobs]) for number in range(jobs)]


@contextlib.contextmanager
def _on_cores(cores: set[int] | None) -> Iterator[None]:
    """A process that is started inside has these cores."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

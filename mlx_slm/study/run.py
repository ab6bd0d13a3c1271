"""A study, cell by cell: a row is kept for each, so that a killed study goes on, and several processes can share it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mlx_slm.errors import Busy, Interrupted, SlmError
from mlx_slm.models.transformer import Shape
from mlx_slm.pretrain import likely_flops
from mlx_slm.report import duration
from mlx_slm.study.cell import Study
from mlx_slm.study.grid import Cell

PATIENCE = 2.0
"""Seconds until cells that other processes hold are asked for again."""


def run_study(study: Study, jobs: int = 1, command: list[str] | None = None) -> list[dict]:
    """Do every cell that is not done; returns all rows, in the order of the grid.

    With several `jobs` as many processes run `command`, this study with one job, each on its part of the cores.
    """
    study.prepare()
    study.file.parent.mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in study.cells if cell.name not in read_rows(study)]
    if todo:
        _announce(study, todo)
    if jobs > 1 and todo:
        _share(study, jobs, command)
    else:
        _work(study)
    rows = read_rows(study)
    return [rows[cell.name] for cell in study.cells]


def read_rows(study: Study) -> dict[str, dict]:
    """The rows of a study that hold for its settings, by cell; a line that a kill cut off is left out."""
    found: dict[str, dict] = {}
    for line in study.file.read_text(encoding="utf-8").splitlines() if study.file.exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if study.settings.get(row["cell"]) == row["settings"]:
                found[row["cell"]] = row
    return found


def _work(study: Study) -> None:
    """Do the cells that nobody else does, until all are done."""
    numbers = {cell: number for number, cell in enumerate(study.cells)}
    with open(study.file.with_suffix(".lock"), "a") as locks:
        while left := [cell for cell in study.cells if cell.name not in read_rows(study)]:
            did_some = False
            for cell in left:
                with _claimed(locks, numbers[cell]) as mine, contextlib.suppress(Busy):
                    if mine and cell.name not in read_rows(study):
                        study.report.line(f"cell {numbers[cell] + 1} of {len(numbers)}: {cell.name}")
                        _append(study.file, study.work(cell))
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


def _append(file: Path, row: dict) -> None:
    """Add a line with one write, behind one that a kill cut off."""
    with open(file, "ab+", buffering=0) as out:
        if out.seek(0, os.SEEK_END):
            out.seek(-1, os.SEEK_END)
        whole = out.read(1) in (b"\n", b"")
        out.write((b"" if whole else b"\n") + json.dumps(row).encode() + b"\n")


def _announce(study: Study, todo: list[Cell]) -> None:
    """Say how long the pretrainings take about; ask where it is over ten minutes."""
    config, flops = study.config, 0.0
    context, vocab = config.data.context_length, config.tokenizer.vocab_size
    shapes = {name: Shape.of(section, vocab, context) for name, section in (("llm", config.large), ("", config.model))}
    runs = {
        (method, cell.seed, cell.k, *((cell.domain, cell.domain_tokens) if method == "is" else ()))
        for cell in todo
        for method in cell.pretrained
    }
    for method, *_ in runs:
        flops += study.budgets[method][-1] * shapes.get(method, shapes[""]).flops_per_token
    seconds = flops / likely_flops()
    study.report.line(
        f"{len(todo)} of {len(study.cells)} cells to do: {len(runs)} pretrainings, where they are not done, of about "
        f"{duration(seconds)} on this machine, and {len(todo)} fine-tunings"
    )
    if seconds > 600 and not study.report.confirm("start?"):
        raise Interrupted("not started; nothing was lost")


def _share(study: Study, jobs: int, command: list[str]) -> None:
    """Let `jobs` processes do the cells, each on its part of the cores, and tell of each row that comes in."""
    parts, logs = _parts_of_cores(jobs), []
    workers = []
    try:
        for number, cores in enumerate(parts, 1):
            logs.append(study.file.with_name(f"{study.name}-job{number}.log"))
            with open(logs[-1], "w") as log, _on_cores(cores):
                workers.append(
                    subprocess.Popen([sys.executable, "-m", "mlx_slm", *command], stdout=log, stderr=subprocess.STDOUT)
                )
        study.report.line(f"{jobs} jobs; what each does: {', '.join(map(str, logs))}")
        told = set(read_rows(study))
        while any(worker.poll() is None for worker in workers):
            time.sleep(PATIENCE)
            told = _tell(study, told)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
    _tell(study, told)
    missing = [cell.name for cell in study.cells if cell.name not in read_rows(study)]
    if missing:
        failed = next((log for worker, log in zip(workers, logs, strict=True) if worker.returncode), logs[0])
        last = (failed.read_text(errors="replace").strip().splitlines() or ["it was killed"])[-1]
        raise SlmError(f"{len(missing)} cells are not done ({failed}: {last}); the same command goes on from there")


def _tell(study: Study, told: set[str]) -> set[str]:
    rows = read_rows(study)
    for name in sorted(set(rows) - told):
        row = rows[name]
        study.report.line(
            f"{len(rows)} of {len(study.cells)}: {name}: perplexity {row['specialized']['perplexity']:.2f}"
        )
    return set(rows)


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

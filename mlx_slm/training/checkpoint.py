"""Checkpoints of a run: `checkpoints/step-<N>/` with weights, moments and state, written whole or not at all.

n steps + kill + resume = an uninterrupted run, bit for bit on a CPU. A damaged checkpoint is passed over for the one
before it. `metrics.jsonl` is cut back to the step that training resumes from.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mlx_slm.errors import SlmError
from mlx_slm.files import Damaged, read_json
from mlx_slm.report import Report
from mlx_slm.storage.arrays import load_arrays, save_arrays
from mlx_slm.storage.artifacts import load_manifest, new_artifact, verify
from mlx_slm.storage.forms import StateForm
from mlx_slm.storage.records import append_json, json_line, read_json_lines, write_json, write_text

KIND = "checkpoint"
WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
KEEP = 2


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}"


def save_checkpoint(run: Path, step: int, parameters: dict, moments: dict, state: dict, keep: set[int]) -> None:
    """Write the checkpoint of a step; then remove all but the last two, and those in `keep`."""
    with new_artifact(checkpoint_path(run, step), KIND, {"step": step}) as (path, _):
        save_arrays(path / WEIGHTS, parameters)
        save_arrays(path / MOMENTS, moments)
        write_json(path / STATE, state)
    for old in checkpoint_steps(run)[:-KEEP]:
        if old not in keep:
            shutil.rmtree(checkpoint_path(run, old))


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the checkpoints at hand, ascending."""
    manifests = (run / "checkpoints").glob("step-*/manifest.json")
    steps = (path.parent.name.removeprefix("step-") for path in manifests)
    return sorted(int(step) for step in steps if step.isascii() and step.isdecimal() and step == str(int(step)))


def load_checkpoint(run: Path, step: int) -> tuple[dict, dict, dict]:
    """Return (parameters, moments, state) of one checkpoint after checking every byte; raises Damaged."""
    path = checkpoint_path(run, step)
    verify(path, load_manifest(path, KIND))
    return load_arrays(path / WEIGHTS), load_arrays(path / MOMENTS), read_json(path / STATE, StateForm)


def adopt(run: Path, step: int, other: Path) -> None:
    """Begin the checkpoints of `other` with that of a step of `run`; of its evaluations none counts there."""
    with new_artifact(checkpoint_path(other, step), KIND, {"step": step}) as (path, _):
        parameters, moments, state = load_checkpoint(run, step)
        save_arrays(path / WEIGHTS, parameters)
        save_arrays(path / MOMENTS, moments)
        write_json(path / STATE, state | {"best_step": None, "best_nll": None, "stale": 0})


def load_weights(run: Path, step: int) -> dict:
    """Parameters of one checkpoint, checked."""
    path = checkpoint_path(run, step)
    verify(path, load_manifest(path, KIND), [WEIGHTS])
    return load_arrays(path / WEIGHTS)


def is_whole(run: Path, step: int) -> bool:
    """Whether the checkpoint of a step can be read, byte for byte."""
    try:
        verify(checkpoint_path(run, step), load_manifest(checkpoint_path(run, step), KIND))
    except SlmError:
        return False
    return True


def load_newest(run: Path, report: Report) -> tuple[dict, dict, dict] | None:
    """The newest whole checkpoint, None if there is none; damaged ones are named, set aside, and passed over."""
    damaged = []
    for step in reversed(checkpoint_steps(run)):
        try:
            return load_checkpoint(run, step)
        except Damaged as error:
            report.warn(f"checkpoint step-{step} cannot be used ({error}); going back to the one before it")
            damaged.append(step)
            aside = run / "checkpoints" / f".damaged-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint_path(run, step), aside)
    if damaged:
        raise SlmError(f"{run}: every checkpoint is damaged (steps {damaged}); start over with --fresh")
    return None


class Metrics:
    """`metrics.jsonl`: a line per report and per evaluation, each with its step."""

    def __init__(self, run: Path, resumed_step: int, report: Report):
        self.path = run / "metrics.jsonl"
        kept = [line for line in read_json_lines(self.path, report) if line["step"] <= resumed_step]
        write_text(self.path, "".join(map(json_line, kept)))

    def write(self, record: dict) -> None:
        append_json(self.path, record)

"""What leaves the workspace: a model directory with its card, quantised, as GGUF, on the Hub."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_slm.errors import SlmError
from mlx_slm.evaluation.evaluate import evaluate
from mlx_slm.experts.experts import has_experts
from mlx_slm.export.card import About, results_of, write_card
from mlx_slm.export.gguf import write_gguf
from mlx_slm.export.hub import push
from mlx_slm.export.model import (
    ADAPTER,
    KIND,
    QUANTIZED,
    export_run,
    load_exported,
    lora_of,
    require_model,
)
from mlx_slm.export.quantize import bits_per_weight, divides, quantize
from mlx_slm.models.shape import Shape
from mlx_slm.project import Project
from mlx_slm.storage.artifacts import MANIFEST, load_manifest, new_artifact
from mlx_slm.training.runs import find_run


@dataclass(frozen=True)
class Export:
    """Write a run or a model in another form."""

    name: str
    """Of a run, or of a model in models/."""
    quantize: int | None = None
    """Bits: 4 or 8."""
    gguf: str | None = None
    """The type of its matrices: f16, q8_0 or f32."""
    fuse: bool = False
    """Of adapters: the model with them applied as well."""
    about: About | None = None
    repo: str | None = None
    """On the Hub, to upload the directory to."""
    private: bool = False


def export(project: Project, request: Export) -> dict:
    """Write what is asked for; returns `{"path", ...}`. An older one stays until the new one is whole."""
    workspace = project.workspace
    if request.name in workspace.runs():
        run = find_run(workspace, request.name)
        if not run.finished:
            raise SlmError(f"run {run.name} is not finished: run its command again, it goes on")
        if has_experts(run):
            raise SlmError(
                f"run {run.name} has experts: --bundle DIR hands them over, "
                f"`mlx-slm specialize --from {run.name}` makes a model of them"
            )
        apart = lora_of(run) is not None
        if request.fuse and not apart:
            raise SlmError(f"run {run.name} trained all weights: there are no adapters for --fuse")
        export_run(workspace, run, request.fuse or bool(apart and (request.quantize or request.gguf)), again=True)
        if apart and not (request.fuse or request.quantize or request.gguf):
            if request.repo:
                raise SlmError(f"{run.name} is adapters: --fuse makes a model of them, which can be uploaded")
            return {"path": str(workspace.adapter(run.name)), "kind": ADAPTER}
    path = require_model(workspace, request.name)
    if not (path / MANIFEST).exists():
        raise SlmError(f"{path} was not exported here: name a run or a model of {workspace.root}")
    result: dict = {}
    if request.quantize:
        whole, path = path, quantize(workspace, request.name, request.quantize)
        result = _cost(project, whole, path)
    if request.gguf:
        if QUANTIZED in load_manifest(path, KIND)["inputs"]:
            raise SlmError(f"{path} is quantised: name the model it is of, with --type q8_0 if it shall be small")
        model, _ = load_exported(path)
        file = workspace.root / "gguf" / f"{path.name}-{request.gguf}.gguf"
        return {"path": str(file), **write_gguf(file, path, model.shape, model.parameters(), request.gguf)}
    _with_card(project, path, request.about)
    manifest = load_manifest(path, KIND)
    shape = manifest["info"]["shape"]
    result = {"path": str(path), "bits_per_weight": bits_per_weight(path, shape), **result}
    if not divides(Shape(**shape)):
        project.report.warn(
            f"{path.name}: dims or hidden_dims are no multiple of 64, so that `mlx_lm.convert -q` leaves such matrices "
            "as they are"
        )
    if request.repo:
        result["address"] = push(path, request.repo, request.private)
    return result


def _with_card(project: Project, path: Path, about: About | None) -> None:
    """Write the card of an exported model anew, with its evaluations."""
    manifest = load_manifest(path, KIND)
    with new_artifact(path, KIND, manifest["inputs"]) as (directory, facts):
        facts.update(manifest["info"])
        for name in manifest["files"]:
            shutil.copyfile(path / name, directory / name)
        write_card(directory, path.name, manifest, about, results_of(project.workspace, path.name))


def _cost(project: Project, whole: Path, quantized: Path) -> dict:
    """Perplexity of both on held-out text of the domain that the model is for, or of the generic set."""
    manifest = load_manifest(whole, KIND)
    run = find_run(project.workspace, manifest["inputs"]["run"])
    name = run.record["inputs"].get("domain") or project.config.data.generic
    rows = evaluate(project, [whole.name, quantized.name], [name], split="valid")["results"]
    return {"set": name, "perplexity": [row["perplexity"] for row in rows]}

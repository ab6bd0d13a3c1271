"""What leaves the workspace: a model directory with its card, quantised, as GGUF, on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlx_slm.errors import SlmError
from mlx_slm.evaluation.evaluate import evaluate
from mlx_slm.experts.experts import has_experts
from mlx_slm.export.card import (
    CARD,
    QUANTIZED,
    About,
    is_own_card,
    require_known_form,
    results_of,
    said_of,
    write_card,
)
from mlx_slm.export.gguf import write_gguf
from mlx_slm.export.hub import push
from mlx_slm.export.model import ADAPTER, KIND, export_run, load_exported, lora_of, require_model, say_sizes
from mlx_slm.export.quantize import bits_per_weight, halve, quantize, whole_model
from mlx_slm.export.start import Pretrained
from mlx_slm.models.shape import Shape
from mlx_slm.project import Project
from mlx_slm.storage.artifacts import MANIFEST, load_manifest
from mlx_slm.training.find import find_run


@dataclass(frozen=True)
class Export:
    """Write a run or a model in another form."""

    name: str
    """Of a run, of a model in models/, or (for a GGUF) a directory of a model."""
    quantize: int | None = None
    """Bits: 4 or 8."""
    dtype: str | None = None
    """Of all weights: bfloat16 or float16."""
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
    if request.about:
        require_known_form(request.about)
    if request.name.partition("@")[0] in workspace.runs():
        if adapters := _export_run(project, request):
            return adapters
    elif request.fuse:
        raise SlmError(f"{request.name} is no run that trained adapters: --fuse has nothing to apply")
    path = require_model(workspace, request.name).resolve()
    if request.gguf:
        return _gguf(project, path, request.gguf)
    if not (path / MANIFEST).exists():
        raise SlmError(
            f"{path} was not exported here: name a run or a model of {workspace.root}; only --format gguf takes others"
        )
    result: dict = {}
    if bits := request.quantize:
        path, result = _smaller(project, path, partial(quantize, workspace, str(path), bits))
    elif request.dtype:
        path, result = _smaller(project, path, partial(halve, workspace, str(path), request.dtype))
    manifest = load_manifest(path, KIND)
    if request.name not in workspace.runs():
        say_sizes(path.name, Shape(**manifest["info"]["shape"]), project.report)
    if is_own_card(path):
        about = (request.about or About()).over(said_of(path, manifest))
        write_card(path, path.name, manifest, about, results_of(workspace, manifest["fingerprint"]))
    else:
        project.report.warn(f"{path / CARD} was changed by hand, so it stays; remove it to have it written anew")
    result = {"path": str(path), "bits_per_weight": bits_per_weight(path, manifest["info"]["shape"]), **result}
    if request.repo:
        result["address"] = push(path, request.repo, request.private)
    return result


def _export_run(project: Project, request: Export) -> dict | None:
    """Write a run's model, or its adapters, which are then all that is asked for."""
    run = find_run(project.workspace, request.name)
    if not run.finished and run.milestone is None:
        raise SlmError(f"run {run.name} is not finished: run its command again, it goes on")
    if has_experts(run):
        raise SlmError(
            f"run {run.name} has experts: --bundle DIR hands them over, "
            f"`mlx-slm specialize --from {run.name}` makes a model of them"
        )
    apart = lora_of(run) is not None
    if request.fuse and not apart:
        raise SlmError(f"run {run.name} trained all weights: there are no adapters for --fuse")
    whole = request.fuse or not apart or bool(request.quantize or request.dtype or request.gguf)
    if not whole and (request.repo or request.about):
        raise SlmError(f"{run.name} is adapters, which have no card and no place on the Hub here: --fuse makes a model")
    export_run(project.workspace, run, project.report, whole and apart)
    return None if whole else {"path": str(project.workspace.adapter(run.name)), "kind": ADAPTER}


def _gguf(project: Project, path: Path, kind: str) -> dict:
    """A model of ours, or a directory that another program made of one."""
    if (path / MANIFEST).exists():
        if QUANTIZED in load_manifest(path, KIND)["inputs"]:
            raise SlmError(f"{path} is quantised: name the model it is of, with --type q8_0 if it shall be small")
        model, _ = load_exported(path)
        shape, parameters = model.shape, model.parameters()
    else:
        start = Pretrained(path, None, option="export")
        shape, parameters = start.shape, start.parameters()
    file = project.workspace.root / "gguf" / f"{path.name}-{kind}.gguf"
    return {"path": str(file), **write_gguf(file, path, shape, parameters, kind)}


def _smaller(project: Project, whole: Path, make: Callable[[], Path]) -> tuple[Path, dict]:
    """(the model in fewer bits, the perplexity of both on held-out text of their domain where there is some)."""
    _, manifest = whole_model(project.workspace, str(whole))
    name = manifest["info"].get("domain") or project.config.data.generic
    try:
        project.workspace.require_set(name, "valid")
    except SlmError as error:
        project.report.warn(f"what it costs in perplexity is not measured: {error}")
        return make(), {}
    before = evaluate(project, [str(whole)], [name], split="valid")["results"]
    path = make()
    rows = [*before, *evaluate(project, [str(path)], [name], split="valid")["results"]]
    return path, {"set": name, "perplexity": [row["perplexity"] for row in rows]}

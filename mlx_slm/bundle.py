"""A network (or a mixture) to hand over: one directory with which any machine specialises it to text of its own.

Section 7 of the paper: whoever pretrained never sees the private text, and whoever specialises needs no generic text. A
bundle is a finished run with one checkpoint's weights, and what its domains are prepared and assigned with: tokenizer,
centroids, and the encoder where it was fitted here.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mlx_slm.clustering.clusters import KIND as CLUSTERS
from mlx_slm.clustering.encoder import KIND as ENCODER
from mlx_slm.clustering.encoder import recorded_encoder
from mlx_slm.config_files import dump_config, load_config
from mlx_slm.errors import SlmError
from mlx_slm.experts import Experts, has_experts
from mlx_slm.report import Report
from mlx_slm.text.tokenizer import KIND as TOKENIZER
from mlx_slm.training.checkpoint import KIND as CHECKPOINT
from mlx_slm.training.checkpoint import STATE, WEIGHTS, checkpoint_path, save_arrays
from mlx_slm.training.runs import Run, expert_path, find_run, open_expert
from mlx_slm.workspace import (
    MANIFEST,
    Workspace,
    is_litter,
    load_manifest,
    new_artifact,
    read_json,
    replace_directory,
    verify,
    write_json,
    write_text,
)

KIND = "bundle"


def export_bundle(workspace: Workspace, run: Run, directory: Path) -> dict:
    """Write a bundle of a run with experts; returns its facts.

    Raises SlmError for a run without experts or unfinished, and for a directory that holds anything but a bundle.
    """
    if not has_experts(run):
        raise SlmError(f"run {run.name} has no experts to hand over: its model is {workspace.model(run.name)}")
    if not run.finished and run.milestone is None:
        raise SlmError(f"run {run.name} is not finished: run its command again, it goes on")
    _require_ours(directory)
    experts, inputs = Experts(workspace, run), {"run": run.name, "is": run.identity}
    missing = sorted({i for i, tokens in enumerate(experts.generic) if tokens} - set(experts.trained))
    if missing:
        raise SlmError(f"expert {missing[0]} of run {run.name} is not trained: run its command again, it goes on")
    encoder = recorded_encoder(workspace, experts.clusters.encoder, "")
    with new_artifact(directory.absolute(), KIND, inputs) as (path, info):
        _write_weights(run, path)
        for number in [] if experts.is_network else experts.trained:
            _write_weights(open_expert(run, number), expert_path(path, number))
        config = load_config(run.path / "config.yaml")
        without_text = config.model_copy(update={"data": config.data.model_copy(update={"sets": {}})})
        write_text(path / "config.yaml", dump_config(without_text))
        copy_artifact(workspace.tokenizer, path / "tokenizer", TOKENIZER)
        copy_artifact(experts.clusters.directory, path / "clusters" / str(experts.k), CLUSTERS)
        fitted = workspace.root / "encoder" / encoder.key
        if (fitted / MANIFEST).exists():
            copy_artifact(fitted, path / "encoder" / encoder.key, ENCODER)
        tokens = read_json(path / "run.json")["tokens"]
        info.update(method=run.record["method"], k=experts.k, tokens=tokens, encoder=encoder.facts)
        info["parameters_of_an_expert"] = run.shape.num_parameters
        (path / "README.md").write_text(_card(run, info), encoding="utf-8")
    return load_manifest(directory, KIND)["info"]


def is_bundle(path: str | os.PathLike) -> bool:
    """Whether a directory is a bundle."""
    manifest = Path(path) / MANIFEST
    found = read_json(manifest) if manifest.exists() else None
    return isinstance(found, dict) and found.get("kind") == KIND


def bundle_at(workspace: Workspace, name: str) -> Path | None:
    """The bundle that a name means: a directory that is one, unless a run of the workspace has that name."""
    return Path(name) if name not in workspace.runs() and is_bundle(name) else None


def _require_ours(directory: Path) -> None:
    """Raise SlmError for a directory that holds more than a bundle."""
    there = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file() and not is_litter(p)}
    ours = {MANIFEST, *load_manifest(directory, KIND)["files"]} if is_bundle(directory) else set()
    if there - ours:
        raise SlmError(f"--bundle {directory}: there is something else ({min(there - ours)}); name a new directory")


def install_bundle(workspace: Workspace, directory: Path, report: Report) -> None:
    """Put tokenizer, centroids, encoder and configuration of a bundle into a workspace that has none, after checking
    every byte; raises SlmError for a workspace that has others."""
    manifest = load_manifest(directory, KIND)
    parts = [("tokenizer", TOKENIZER), (f"clusters/{manifest['info']['k']}", CLUSTERS)]
    parts += [
        (path.parent.relative_to(directory).as_posix(), ENCODER) for path in directory.glob(f"encoder/*/{MANIFEST}")
    ]
    missing = []
    for name, kind in parts:
        there = workspace.root / name
        if not (there / MANIFEST).exists():
            missing.append((name, kind))
        elif load_manifest(there, kind)["fingerprint"] != load_manifest(directory / name, kind)["fingerprint"]:
            raise SlmError(f"{there} is another than that of the bundle {directory}: use a new --workspace")
    if missing:
        verify(directory, manifest)
    for name, kind in missing:
        copy_artifact(directory / name, workspace.root / name, kind)
        report.line(f"took {name} from {directory}")
    if not workspace.config_file.exists():
        write_text(workspace.config_file, (directory / "config.yaml").read_text(encoding="utf-8"))


def find_source(workspace: Workspace, name: str) -> Run:
    """The run of a name in the workspace, or that of a bundle's directory; raises SlmError for neither."""
    if bundle := bundle_at(workspace, name):
        return Run(bundle.absolute(), read_json(bundle / "run.json"))
    if os.sep in name and "@" not in name:
        raise SlmError(f"{name}: no bundle is there (`mlx-slm export RUN --bundle DIR` writes one)")
    return find_run(workspace, name)


def copy_artifact(source: Path, path: Path, kind: str) -> None:
    """Copy an artifact, and of its directory nothing else, whole or not at all."""
    manifest = load_manifest(source, kind)
    verify(source, manifest)
    temporary = path.with_name(f".{path.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    for name in (*manifest["files"], MANIFEST):
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, temporary / name)
    replace_directory(temporary, path)


def _write_weights(run: Run, path: Path) -> None:
    """The run as it is after its last step, or at its milestone, without the moments that only more pretraining would
    need."""
    step, record = run.weights_step(), run.record | {"name": run.name}
    if run.milestone is not None:
        state = read_json(checkpoint_path(run.path, step) / STATE)
        record |= {"status": "finished", "step": step, "tokens": state["tokens"], "seconds": state["seconds"]}
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "run.json", record)
    if step is not None:
        with new_artifact(checkpoint_path(path, step), CHECKPOINT, {"step": step}) as (directory, _):
            save_arrays(directory / WEIGHTS, run.weights())


def _card(run: Run, info: dict) -> str:
    kind = "projected network" if info["method"] == "pn" else "hard mixture"
    encoder = "\n".join(f"- {key}: {value}" for key, value in info["encoder"].items())
    inputs, shape = run.record["inputs"], run.shape
    mass = sum(inputs["generic"])
    rows = "\n".join(f"| {i} | {tokens:,} | {tokens / mass:.2%} |" for i, tokens in enumerate(inputs["generic"]))
    return f"""---
library_name: mlx
tags: [mlx, mlx-slm]
---

# {run.name}

A {kind} of {info["k"]} experts, each a language model of {info["parameters_of_an_expert"]:,} parameters
({shape.family}, vocabulary {shape.vocab_size:,}, context {shape.context_length:,}), pretrained by mlx-slm on
{info["tokens"]:,} tokens. With it a small model for a domain is made where the domain's text is, and nothing of that
text leaves the machine:

    mlx-slm specialize --domain notes --from THIS_DIRECTORY notes/*.md

A window of text belongs to the cluster whose centroid is nearest to its embedding by this encoder:

{encoder}

Identity of the run: {run.identity}

| cluster | generic tokens | share |
|---|---|---|
{rows}
"""

"""A network (or a mixture) to hand over, written: one directory with which any machine specialises it (`bundle`).

A bundle is a finished run with one checkpoint's weights, and what its domains are prepared and assigned with:
tokenizer, centroids, and the encoder where it was fitted here.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from mlx_slm.clustering.clusters import KIND as CLUSTERS
from mlx_slm.config.files import dump_config
from mlx_slm.embedding.encoder import KIND as ENCODER
from mlx_slm.embedding.encoder import recorded_encoder
from mlx_slm.errors import SlmError
from mlx_slm.experts.bundle import KIND, TOKENIZER_FOLDER, copy_artifact, is_bundle
from mlx_slm.experts.experts import Experts, has_experts
from mlx_slm.files import read_json
from mlx_slm.storage.arrays import save_arrays
from mlx_slm.storage.artifacts import EDITABLE, MANIFEST, is_litter, load_manifest, new_artifact
from mlx_slm.storage.forms import LICENSE
from mlx_slm.storage.locks import alone
from mlx_slm.storage.records import write_record, write_text
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.tokenizer import KIND as TOKENIZER
from mlx_slm.training.checkpoint import KIND as CHECKPOINT
from mlx_slm.training.checkpoint import STATE, WEIGHTS, checkpoint_path
from mlx_slm.training.runs import CONFIG, RECORD, Run, expert_path, read_run, require_expert, without_path


def export_bundle(workspace: Workspace, run: Run, directory: Path) -> dict:
    """Write a bundle of a run with experts; returns its facts.

    Raises SlmError for a run without experts or unfinished, and for a directory that holds anything but a bundle.
    """
    if not has_experts(run):
        raise SlmError(f"run {run.name} has no experts to hand over: its model is {workspace.model(run.name)}")
    if not run.finished and run.milestone is None:
        raise SlmError(f"run {run.name} is not finished: run its command again, it goes on")
    _require_ours(directory)
    experts, inputs = Experts(workspace, run), {"run": run.name, "identity": run.identity}
    missing = sorted({i for i, tokens in enumerate(experts.generic) if tokens} - set(experts.trained))
    if missing:
        raise SlmError(f"expert {missing[0]} of run {run.name} is not trained: run its command again, it goes on")
    encoder = recorded_encoder(workspace, experts.clusters.encoder, "")
    lock = directory.absolute().with_name(f".{directory.absolute().name}.lock")
    with (
        alone(lock, f"another process is writing {directory}: wait until it ends"),
        new_artifact(directory.absolute(), KIND, inputs) as (path, info),
    ):
        _write_weights(run, path)
        for number in [] if experts.is_network else experts.trained:
            _write_weights(require_expert(run, number), expert_path(path, number))
        config = run.config()
        without_text = config.model_copy(update={"data": config.data.model_copy(update={"sets": {}})})
        write_text(path / CONFIG, dump_config(without_text))
        copy_artifact(workspace.tokenizer, path / TOKENIZER_FOLDER, TOKENIZER)
        copy_artifact(experts.clusters.directory, path / "clusters" / str(experts.k), CLUSTERS)
        fitted = workspace.root / "encoder" / encoder.key
        if (fitted / MANIFEST).exists():
            copy_artifact(fitted, path / "encoder" / encoder.key, ENCODER)
        tokens = read_run(path)["tokens"]
        info.update(method=run.record["method"], k=experts.k, tokens=tokens, encoder=encoder.facts)
        info["parameters_of_an_expert"] = run.shape.num_parameters
        (path / EDITABLE).write_text(_card(run, info), encoding="utf-8")
    return load_manifest(directory, KIND)["info"]


def _require_ours(directory: Path) -> None:
    """Raise SlmError for a directory that holds more than a bundle."""
    there = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file() and not is_litter(p)}
    ours = {MANIFEST, EDITABLE, *load_manifest(directory, KIND)["files"]} if is_bundle(directory) else set()
    if there - ours:
        raise SlmError(f"--bundle {directory}: there is something else ({min(there - ours)}); name a new directory")


def _write_weights(run: Run, path: Path) -> None:
    """The run as it is after its last step, or at its milestone, without the moments that only more pretraining would
    need."""
    step, record = run.weights_step(), run.record | {"name": run.name}
    if run.milestone is not None and step is not None:
        state = read_json(checkpoint_path(run.kept_in(step), step) / STATE)
        record |= {"status": "finished", "step": step, "tokens": state["tokens"], "seconds": state["seconds"]}
    if run.published:
        record |= {"published": without_path(run.published)}
    path.mkdir(parents=True, exist_ok=True)
    write_record(path / RECORD, record)
    if step is not None:
        with new_artifact(checkpoint_path(path, step), CHECKPOINT, {"step": step}) as (directory, _):
            save_arrays(directory / WEIGHTS, run.weights())


def _card(run: Run, info: dict) -> str:
    kind = "projected network" if run.is_network else "hard mixture"
    encoder = "\n".join(f"- {key}: {value}" for key, value in info["encoder"].items())
    inputs, shape = run.record["inputs"], run.shape
    mass = sum(inputs["generic"])
    rows = "\n".join(f"| {i} | {tokens:,} | {tokens / mass:.2%} |" for i, tokens in enumerate(inputs["generic"]))
    published = run.published or {}
    said = {key: published[key] for key in LICENSE if published.get(key)}
    terms = yaml.safe_dump(said, sort_keys=False) if said else ""
    return f"""---
library_name: mlx
tags: [mlx, mlx-slm]
{terms}---

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

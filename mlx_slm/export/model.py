"""A run -> a plain model directory that mlx-lm and transformers load, and back."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import mlx.core as mx

from mlx_slm.errors import SlmError, nearest
from mlx_slm.experts.experts import has_experts
from mlx_slm.export.card import QUANTIZED, is_own_card, published_in, said_of, write_card
from mlx_slm.export.published import download, is_hub_name
from mlx_slm.export.start import Pretrained, no_weights
from mlx_slm.fields import MAX_DIMENSION
from mlx_slm.files import Damaged, load_tokenizer_json, read_json, require_form, require_safetensors
from mlx_slm.machine.trees import flat, nested
from mlx_slm.models.families import FAMILIES
from mlx_slm.models.lora import Lora
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, parameter_shapes
from mlx_slm.report import Report
from mlx_slm.storage.arrays import read_safetensors, save_arrays
from mlx_slm.storage.artifacts import EDITABLE, MANIFEST, is_litter, load_manifest, new_artifact, verify
from mlx_slm.storage.forms import ConfigForm, TokenizerSettings
from mlx_slm.storage.records import write_json
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.hub_tokenizer import open_tokenizer, require_tokenizer_json, same_ids, tokenizer_of
from mlx_slm.text.tokenizer import Tokenizer
from mlx_slm.training.find import find_run
from mlx_slm.training.runs import Run, without_path

KIND, ADAPTER = "model", "adapter"
GROUP = 64
"""Weights that share a scale and an offset in mlx-lm, where it is not told otherwise."""


def export_run(workspace: Workspace, run: Run, report: Report, fuse: bool = False) -> None:
    """Write the run's weights to `models/<run>`, unless they are there; of a milestone to `models/<run>-step-<step>`.

    Those of LoRA go to `adapters/<run>` in mlx-lm's format, and, with `fuse`, as a plain model to `models/<run>` too.
    Says so where mlx-lm's defaults would quantise the model in part only.
    """
    step, inputs = run.weights_step(), run.record["inputs"]
    made_from = {"run": run.name, "step": step, "method": run.record["method"], "tokenizer": inputs["tokenizer"]}
    info = {key: run.record.get(key) for key in ("tokens", "seconds", "device", "valid_nll", "started", "selection")}
    info |= {
        "domain": inputs.get("domain"),
        "from": inputs.get("from"),
        "published": without_path(run.published),
        "teacher": _teacher_of(workspace, run),
    }
    lora = lora_of(run)
    if lora and not _is_written(workspace.adapter(run.name), ADAPTER, run):
        arrays, config = lora.to_mlx_lm(run.weights())
        with new_artifact(workspace.adapter(run.name), ADAPTER, made_from | {"base": inputs["from"]}) as (path, facts):
            facts.update(info, parameters=lora.num_parameters)
            save_arrays(path / "adapters.safetensors", arrays)
            write_json(path / "adapter_config.json", config)
    if (fuse or not lora) and not _is_written(workspace.model(run.label), KIND, run):
        parameters, tokenizer = weights_of(workspace, run), open_tokenizer(workspace.tokenizer)
        shape = _as_long(run.shape, info["published"])
        export_model(workspace.model(run.label), shape, parameters, tokenizer, made_from, info)
        say_sizes(run.label, shape, report)


def _as_long(shape: Shape, published: dict | None) -> Shape:
    """A shape with the context of the published model that it comes from, of which training took shorter windows."""
    if not published or FAMILIES[shape.family].learned_positions:
        return shape
    longest = min(published.get("context_length") or 0, MAX_DIMENSION)
    return dataclasses.replace(shape, context_length=max(shape.context_length, longest))


def say_sizes(name: str, shape: Shape, report: Report) -> None:
    if not shape.falls_into(GROUP):
        report.line(
            f"{name}: dims or hidden_dims are no multiple of {GROUP}: `mlx_lm.convert -q` leaves such matrices as they "
            "are"
        )


def _is_written(path: Path, kind: str, run: Run) -> bool:
    if not (path / MANIFEST).exists():
        return False
    manifest = load_manifest(path, kind)
    said = without_path(run.published)
    return manifest["info"].get("started") == run.record["started"] and said in (None, published_in(manifest))


def lora_of(run: Run) -> Lora | None:
    """The adapters of a run that trained some."""
    settings = run.record["inputs"].get("lora")
    return Lora(run.shape, **settings) if settings else None


def weights_of(workspace: Workspace, run: Run) -> dict:
    """Parameters of the run's model: its weights, or those of the run it started from with its adapters applied."""
    lora = lora_of(run)
    if lora is None:
        return run.weights()
    origin = run.record["inputs"]["from"]
    if run.published and "weights" in origin:
        return lora.applied(_original(run, run.published, origin["weights"]).parameters(), run.weights())
    base = find_run(workspace, origin["run"])
    if base.identity != origin["identity"]:
        raise SlmError(
            f"run {base.name} was trained again since {run.name} adapted it: specialise it again, with --lora --fresh"
        )
    start = weights_of(workspace, dataclasses.replace(base, milestone=origin["step"]))
    return lora.applied(start, run.weights())


def _teacher_of(workspace: Workspace, run: Run) -> dict | None:
    """What a model learnt from: `{"run", "published"}`, the latter as far as that run is still there."""
    teacher = run.record["inputs"].get("teacher")
    if teacher is None:
        return None
    known = find_run(workspace, teacher["run"]) if teacher["run"] in workspace.runs() else None
    same = known is not None and known.identity == teacher["identity"]
    return {"run": teacher["run"], "published": without_path(known.published) if known and same else None}


def rests_on(workspace: Workspace, run: Run) -> list[str]:
    """The names of the runs whose weights those of a run are made of: its own, and the bases of adapters."""
    origin = run.record["inputs"].get("from")
    if lora_of(run) is None or not isinstance(origin, dict) or origin.get("run") not in workspace.runs():
        return [run.name]
    return [run.name, *rests_on(workspace, find_run(workspace, origin["run"]))]


def _original(run: Run, published: dict, weights: str) -> Pretrained:
    """The published model that a run adapted; raises SlmError where it is another one by now."""
    name = published["model"]
    path = download(f"{name}@{published['revision']}") if published["revision"] else Path(name)
    if not path.exists():
        raise SlmError(
            f"run {run.name} adapted {name}, which is not there any more: bring it back, or run the command of "
            f"{run.name} again with --from its new place"
        )
    model = Pretrained(path, run.shape.context_length, option=None)
    if model.fingerprint != weights:
        raise SlmError(
            f"{name} has other weights since {run.name} adapted them: specialise it again, with --lora --fresh"
        )
    return model


def export_model(path: Path, shape: Shape, parameters: dict, tokenizer: Tokenizer, inputs: dict, info: dict) -> Path:
    """Write config.json, model.safetensors, the tokenizer and a model card."""
    with new_artifact(path, KIND, inputs) as (directory, facts):
        facts.update(info, parameters=shape.num_parameters, shape=shape.to_dict())
        (directory / "config.json").write_text(json.dumps(huggingface_config(shape, tokenizer.eos_id), indent=1))
        save_arrays(directory / "model.safetensors", FAMILIES[shape.family].to_hub(parameters), {"format": "pt"})
        tokenizer.export(directory)
        keep_what_is_not_ours(path, directory)
        if not (directory / EDITABLE).exists():
            before = load_manifest(path, KIND) if (path / MANIFEST).exists() else None
            write_card(directory, path.name, {"inputs": inputs, "info": facts}, said_of(path, before))
    return path


def keep_what_is_not_ours(path: Path, new: Path) -> None:
    """Copy what somebody laid into a model's directory, and a card changed by hand, into the one that replaces it."""
    if not (path / MANIFEST).exists():
        return
    ours = {MANIFEST, EDITABLE, *load_manifest(path, KIND)["files"]}
    for file in path.iterdir():
        if file.is_file() and file.name not in ours and not (new / file.name).exists():
            shutil.copyfile(file, new / file.name)
    if not is_own_card(path):
        shutil.copyfile(path / EDITABLE, new / EDITABLE)


def huggingface_config(shape: Shape, eos_id: int) -> dict:
    """config.json for transformers and mlx-lm. The weights are fp32; `torch_dtype` is what mlx-lm's conversion makes of
    them, without which the scales of quantised weights would be fp32 too: 5 bits a weight in place of 4.5."""
    family = FAMILIES[shape.family]
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": shape.vocab_size,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "tie_word_embeddings": shape.tied,
        "dtype": "float32",
        "torch_dtype": "float16",
        **family.to_hub_config(shape),
    }


def load_exported(path: Path) -> tuple[Transformer, dict]:
    """Return (model, manifest) of an exported directory after checking every byte."""
    manifest = load_manifest(path, KIND)
    verify(path, manifest)
    shape = Shape(**manifest["info"]["shape"])
    model = Transformer(shape)
    weights = FAMILIES[shape.family].from_hub(read_safetensors(path / "model.safetensors"))
    shapes = {name: value.shape for name, value in flat(weights).items()}
    if shapes != parameter_shapes(shape):
        raise Damaged(
            f"{path / 'model.safetensors'} does not fit the shape in {MANIFEST}; remove {path}, make it again"
        )
    model.update(nested({name: value.astype(mx.float32) for name, value in flat(weights).items()}))
    return model, manifest


def load_any(workspace: Workspace, name: str) -> tuple[Transformer, str | Tokenizer]:
    """Return (model, fingerprint of its tokenizer) of an exported model, by name or directory, of a run, or of a
    directory that another program made of a model, fused or quantised, or of a published model. A model that reads text
    in another way than the workspace comes with its own tokenizer."""
    path = find_model(workspace, name)
    if path and QUANTIZED not in load_manifest(path, KIND)["inputs"]:
        model, manifest = load_exported(path)
        return model, _reader(workspace, path, manifest["inputs"]["tokenizer"])
    if directory := path or (None if name.partition("@")[0] in workspace.runs() else find_directory(workspace, name)):
        return _load_foreign(workspace, directory)
    check_model(workspace, name)
    run = find_run(workspace, name)
    model = Transformer(run.shape)
    model.update(weights_of(workspace, run))
    return model, run.record["inputs"]["tokenizer"]


def _load_foreign(workspace: Workspace, path: Path) -> tuple[Transformer, str | Tokenizer]:
    check_directory(path)
    pretrained = Pretrained(path, None, option=None)
    model = Transformer(pretrained.shape)
    model.update(pretrained.parameters())
    return model, _reader(workspace, path)


def _reader(workspace: Workspace, path: Path, fingerprint: str | None = None) -> str | Tokenizer:
    """The fingerprint of the workspace's tokenizer where a model reads as that does, else the model's own tokenizer."""
    ours = open_tokenizer(workspace.tokenizer)
    if fingerprint == ours.fingerprint:
        return fingerprint
    require_tokenizer_json(path)
    return ours.fingerprint if same_ids(path, ours.directory) else tokenizer_of(path)


def find_model(workspace: Workspace, name: str) -> Path | None:
    """The directory of an exported model, by name or path; None if there is none."""
    return next((p for p in (workspace.root / "models" / name, Path(name)) if (p / MANIFEST).exists()), None)


def check_model(workspace: Workspace, name: str) -> None:
    """Raise SlmError, with the known models and runs, for a name that `load_any` would not find."""
    there = find_model(workspace, name) or (Path(name) / "config.json").exists() or is_hub_name(name)
    if not there and name.partition("@")[0] not in workspace.runs():
        raise SlmError(_unknown(workspace, name, [*workspace.models(), *workspace.runs()]))


def require_model(workspace: Workspace, name: str) -> Path:
    """The directory of a model to run: an exported one, any directory with a config.json, one of the Hub, or that of a
    finished run or a milestone, which is written where it was not; raises SlmError."""
    path = find_directory(workspace, name) or _written_now(workspace, name)
    if path is None:
        raise SlmError(_unknown(workspace, name, workspace.models()))
    check_directory(path)
    return path


def _written_now(workspace: Workspace, name: str) -> Path | None:
    """The model of a run, or of RUN@TOKENS; None for a name that is no run's."""
    if name.partition("@")[0] not in workspace.runs():
        return None
    run = find_run(workspace, name)
    if has_experts(run):
        raise SlmError(f"run {run.name} has experts: `mlx-slm specialize --from {run.name}` makes a model of them")
    if run.milestone is None and not run.finished:
        raise SlmError(f"run {run.name} is not finished: run its command again, it goes on, or name a milestone of it")
    export_run(workspace, run, Report(), fuse=True)
    return workspace.model(run.label)


def find_directory(workspace: Workspace, name: str) -> Path | None:
    """The directory of a model: an exported one, any with a config.json, or one of the Hub; None for another name."""
    path = find_model(workspace, name)
    if path is None and (Path(name) / "config.json").exists():
        path = Path(name)
    if path is None and is_hub_name(name):
        path = download(name)
    return path


def reading_files(path: Path) -> list[Path]:
    """The files of an exported model that say how text is read."""
    others = ("config.json", EDITABLE, MANIFEST)
    return [p for p in sorted(path.iterdir()) if p.is_file() and p.name not in others and p.suffix != ".safetensors"]


def check_directory(path: Path) -> None:
    """Raise SlmError for a model directory that is damaged, of unknown form, or wants to run code of its own."""
    if (path / MANIFEST).exists():
        verify(path, load_manifest(path, KIND))
    config = read_json(path / "config.json", ConfigForm)
    if {"model_file", "auto_map"} & set(config):
        raise SlmError(f"{path / 'config.json'}: the model brings code of its own, which is not run here")
    if config["model_type"] in FAMILIES:
        require_form(config, FAMILIES[config["model_type"]].form, path / "config.json")
    weights = sorted(file for file in path.glob("*.safetensors") if not is_litter(file))
    if not weights:
        raise SlmError(f"{path}: {no_weights(path)}")
    for file in weights:
        require_safetensors(file)
    if (path / "tokenizer.json").exists():
        load_tokenizer_json(path / "tokenizer.json")
    if (path / "tokenizer_config.json").exists():
        read_json(path / "tokenizer_config.json", TokenizerSettings)


def _unknown(workspace: Workspace, name: str, known: list[str]) -> str:
    listed = ", ".join(dict.fromkeys(known)) or "none yet; `mlx-slm specialize` makes one"
    return f"no model {name!r} in {workspace.root}{nearest(name, known)}; known: {listed}"

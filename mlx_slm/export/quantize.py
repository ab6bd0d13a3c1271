"""A model in fewer bits a weight: 4 or 8 by mlx-lm's own conversion, or 16."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import mlx.core as mx

from mlx_slm.errors import SlmError
from mlx_slm.export.card import QUANTIZED, about_of, said_of, write_card
from mlx_slm.export.model import GROUP, KIND, keep_what_is_not_ours, load_exported, reading_files, require_model
from mlx_slm.files import read_json
from mlx_slm.machine.trees import flat, nested
from mlx_slm.models.families import FAMILIES
from mlx_slm.models.shape import Shape
from mlx_slm.storage.arrays import read_safetensors, save_arrays
from mlx_slm.storage.artifacts import EDITABLE, MANIFEST, load_manifest, new_artifact
from mlx_slm.storage.records import write_json
from mlx_slm.storage.workspace import Workspace

HALVES = {"bfloat16": "bf16", "float16": "fp16"}
"""Types of 16 bits, and what the names of models call them."""
GROUPS = (GROUP, GROUP // 2)


def quantize(workspace: Workspace, name: str, bits: int) -> Path:
    """Write `models/<name>-<bits>bit` from an exported model; returns its directory.

    Raises SlmError for a model that was not exported here, or is quantised already.
    """
    from mlx_lm import convert

    source, manifest = whole_model(workspace, name)
    group = next((size for size in GROUPS if Shape(**manifest["info"]["shape"]).falls_into(size)), None)
    if group is None:
        raise SlmError(
            f"{source}: dims or hidden_dims are no multiple of {GROUPS[-1]}, so that mlx-lm would leave matrices as "
            "they are: train one whose sizes are multiples of 64"
        )
    path = workspace.model(f"{source.name}-{bits}bit")
    made_from = manifest["inputs"] | {QUANTIZED: bits, "model": manifest["fingerprint"]}
    with new_artifact(path, KIND, made_from) as (directory, facts):
        converted = directory / "converted"
        with contextlib.redirect_stdout(io.StringIO()):
            convert(str(source), str(converted), quantize=True, q_bits=bits, q_group_size=group)
        shutil.move(converted / "config.json", directory / "config.json")
        for file in converted.glob("model*.safetensors*"):
            shutil.move(file, directory / file.name)
        shutil.rmtree(converted)
        _complete(directory, path, source, made_from, facts)
    return path


def halve(workspace: Workspace, name: str, dtype: str) -> Path:
    """Write `models/<name>-bf16` (or fp16) from an exported model, all its weights rounded to `dtype`; returns its
    directory. Raises SlmError for a model that was not exported here, or is quantised."""
    source, manifest = whole_model(workspace, name)
    model, _ = load_exported(source)
    kept = {key: value.astype(getattr(mx, dtype)) for key, value in flat(model.parameters()).items()}
    if overflowing := [key for key, value in kept.items() if not mx.isfinite(value).all()]:
        raise SlmError(f"{source}: {overflowing[0]} holds numbers beyond {dtype}: take bfloat16")
    path = workspace.model(f"{source.name}-{HALVES[dtype]}")
    made_from = manifest["inputs"] | {"dtype": dtype, "model": manifest["fingerprint"]}
    with new_artifact(path, KIND, made_from) as (directory, facts):
        config = read_json(source / "config.json") | {"dtype": dtype, "torch_dtype": dtype}
        write_json(directory / "config.json", config)
        weights = FAMILIES[model.shape.family].to_hub(nested(kept))
        save_arrays(directory / "model.safetensors", weights, {"format": "pt"})
        _complete(directory, path, source, made_from, facts)
    return path


def whole_model(workspace: Workspace, name: str) -> tuple[Path, dict]:
    """(directory, manifest) of an exported model with the weights that training gave it."""
    source = require_model(workspace, name).resolve()
    if not (source / MANIFEST).exists():
        raise SlmError(f"{source} was not exported here: mlx_lm.convert --hf-path {source} --mlx-path NEW -q")
    manifest = load_manifest(source, KIND)
    if bits := manifest["inputs"].get(QUANTIZED) or ("dtype" in manifest["inputs"] and 16):
        raise SlmError(f"{source} has {bits} bits a weight already: name the model it is of")
    return source, manifest


def _complete(directory: Path, path: Path, source: Path, made_from: dict, facts: dict) -> None:
    """Add to the new weights in `directory`, which becomes `path`, all that `source` has beside its own."""
    manifest = load_manifest(source, KIND)
    info = manifest["info"]
    for file in reading_files(source):
        shutil.copyfile(file, directory / file.name)
    facts.update(info, bits_per_weight=bits_per_weight(directory, info["shape"]))
    keep_what_is_not_ours(path, directory)
    if not (directory / EDITABLE).exists():
        about = about_of(path) or said_of(source, manifest)
        write_card(directory, path.name, {"inputs": made_from, "info": facts}, about)


def bits_per_weight(directory: Path, shape: dict) -> float:
    """Bits that the safetensors of a model hold for each of its parameters."""
    arrays = [a for file in directory.glob("*.safetensors") for a in flat(read_safetensors(file)).values()]
    return 8 * sum(array.nbytes for array in arrays) / Shape(**shape).num_parameters

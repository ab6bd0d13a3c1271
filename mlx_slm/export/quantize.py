"""A model in 4 or 8 bits a weight, by mlx-lm's own conversion."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

from mlx_slm.errors import SlmError
from mlx_slm.export.card import QUANTIZED, about_of, write_card
from mlx_slm.export.model import GROUP, KIND, keep_what_is_not_ours, reading_files, require_model
from mlx_slm.machine.trees import flat
from mlx_slm.models.shape import Shape
from mlx_slm.storage.arrays import read_safetensors
from mlx_slm.storage.artifacts import EDITABLE, MANIFEST, load_manifest, new_artifact
from mlx_slm.storage.workspace import Workspace

GROUPS = (GROUP, GROUP // 2)


def quantize(workspace: Workspace, name: str, bits: int) -> Path:
    """Write `models/<name>-<bits>bit` from an exported model; returns its directory.

    Raises SlmError for a model that was not exported here, or is quantised already.
    """
    from mlx_lm import convert

    source = require_model(workspace, name).resolve()
    if not (source / MANIFEST).exists():
        raise SlmError(f"{source} was not exported here: mlx_lm.convert --hf-path {source} --mlx-path NEW -q")
    manifest = load_manifest(source, KIND)
    if QUANTIZED in manifest["inputs"]:
        raise SlmError(f"{source} has {manifest['inputs'][QUANTIZED]} bits a weight already: name the model it is of")
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
        for file in reading_files(source):
            shutil.copyfile(file, directory / file.name)
        facts.update(manifest["info"], bits_per_weight=bits_per_weight(directory, manifest["info"]["shape"]))
        keep_what_is_not_ours(path, directory)
        if not (directory / EDITABLE).exists():
            write_card(directory, path.name, {"inputs": made_from, "info": facts}, about_of(path) or about_of(source))
    return path


def bits_per_weight(directory: Path, shape: dict) -> float:
    """Bits that the safetensors of a model hold for each of its parameters."""
    arrays = [a for file in directory.glob("*.safetensors") for a in flat(read_safetensors(file)).values()]
    return 8 * sum(array.nbytes for array in arrays) / Shape(**shape).num_parameters

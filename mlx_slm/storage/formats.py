"""The number of each format: what is written has it, what has another one is not read but built again.

Raise a number where a reader of before would misread what is written now. What was written before there were numbers
has format 1.
"""

from __future__ import annotations

from pathlib import Path

from mlx_slm.config import schema
from mlx_slm.errors import SlmError
from mlx_slm.storage.records import fingerprint

KEY = "format"
FORMATS = {
    "tokenizer": 1,
    "token store": 1,
    "encoder": 1,
    "embeddings": 1,
    "clusters": 1,
    "assignments": 1,
    "k-means state": 1,
    "checkpoint": 1,
    "model": 1,
    "adapter": 1,
    "bundle": 1,
}
"""Of each kind of artifact."""
ROWS = 1
"""How windows are laid out in the rows of a step (`text.rows`): part of what a run is made from."""

RENAMED = {"training": schema.RENAMED, "from": {"is": "identity"}, "teacher": {"is": "identity"}}
"""Former names of keys, by section, of what a run was made from."""


def renamed(inputs: dict, back: bool = False) -> dict:
    """What a run was made from with the keys of today; `back`: with the former ones, of which fingerprints are taken so
    that a run keeps its identity."""

    def keyed(section: str, values):
        former = RENAMED.get(section, {})
        names = {now: key for key, now in former.items()} if back else former
        return {names.get(key, key): value for key, value in values.items()} if isinstance(values, dict) else values

    return {section: keyed(section, values) for section, values in inputs.items()}


def identity_of(record: dict) -> str:
    """What other runs know a run by: another one where it was trained again, or differently."""
    return record.get("identity") or fingerprint([renamed(record["inputs"], back=True), record["started"]])


def published_apart(record: dict) -> dict:
    """A run's record with what is said of a published model apart from what identifies it, its weights; records that
    had it in one place keep the identity that they had."""
    origin = record["inputs"].get("from")
    if not isinstance(origin, dict) or "model" not in origin:
        return record
    said = {key: value for key, value in origin.items() if key != "weights"}
    inputs = record["inputs"] | {"from": {"weights": origin["weights"]}}
    return record | {"inputs": inputs, "published": said, "identity": identity_of(record)}


class OtherFormat(SlmError):
    """An artifact in a format of another version."""


def require_format(path: Path, kind: str, number: int) -> None:
    """Raise OtherFormat, with the command that builds it again, for an artifact that this version does not read."""
    known = FORMATS.get(kind, 1)
    if number != known:
        raise OtherFormat(f"{path} has format {number} of a {kind}, this version reads {known}: {_remedy(path, kind)}")


def _remedy(path: Path, kind: str) -> str:
    if kind == "token store":
        return f"run `mlx-slm prepare {path.parent.name} --fresh`"
    if kind == "tokenizer":
        return "run `mlx-slm prepare generic --fresh`, and then every set"
    if kind == "clusters":
        return f"run `mlx-slm cluster --k {path.name} --fresh`"
    if kind in ("encoder", "embeddings", "assignments", "k-means state"):
        return f"remove {path} and run `mlx-slm cluster`"
    if kind == "checkpoint":
        return f"train run {path.parents[1].name} again, with --fresh"
    if kind in ("model", "adapter"):
        return f"remove {path} and run the command of run {path.name} again, which writes it"
    return "get it again, or read it with the version that wrote it"

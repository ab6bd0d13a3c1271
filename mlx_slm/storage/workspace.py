"""Where everything that a user makes lies."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from mlx_slm.errors import SlmError, nearest
from mlx_slm.storage.artifacts import MANIFEST, recover

EVALUATIONS = "evaluations.jsonl"
"""Of `evaluate`, in results/."""


class Workspace:
    """One directory with everything that a user makes: by default $MLX_SLM_WORKSPACE, else ./workspace."""

    def __init__(self, root: str | os.PathLike | None = None):
        self.root = Path(root or os.environ.get("MLX_SLM_WORKSPACE") or "workspace").expanduser()
        self.config_file = self.root / "config.yaml"
        self.tokenizer = self.root / "tokenizer"
        self.results = self.root / "results"

    def data(self, name: str, split: str) -> Path:
        return _named(self.root / "data", name) / split

    def embeddings(self, encoder: str, name: str, split: str) -> Path:
        return _named(self.root / "embeddings" / encoder, name) / split

    def clusters(self, k: int) -> Path:
        return self.root / "clusters" / str(k)

    def run(self, name: str) -> Path:
        return _named(self.root / "runs", name)

    def model(self, name: str) -> Path:
        return _named(self.root / "models", name)

    def adapter(self, name: str) -> Path:
        return _named(self.root / "adapters", name)

    def sets(self) -> list[str]:
        """Names of the prepared sets."""
        return sorted(p.parent.parent.name for p in self.root.glob(f"data/*/train/{MANIFEST}"))

    def runs(self) -> list[str]:
        return sorted(p.parent.name for p in self.root.glob("runs/*/run.json"))

    def models(self) -> list[str]:
        return sorted(p.parent.name for p in self.root.glob(f"models/*/{MANIFEST}"))

    def adapters(self) -> list[str]:
        return sorted(p.parent.name for p in self.root.glob(f"adapters/*/{MANIFEST}"))

    def artifacts(self) -> Iterator[Path]:
        """Every directory here that has a manifest."""
        manifests = sorted(self.root.rglob(MANIFEST))
        return (p.parent for p in manifests if not any(q.startswith(".") for q in p.relative_to(self.root).parts))

    def require_set(self, name: str, split: str = "train") -> Path:
        """Return the directory of a prepared split, or raise with the known sets."""
        path = self.data(name, split)
        recover(path)
        if not (path / MANIFEST).exists():
            known = self.sets()
            listed = ", ".join(known) or "none yet"
            hint = nearest(name, known) if name not in known else ""
            what = f"the {split} split of {name!r}" if name in known else f"set {name!r}"
            raise SlmError(f"{what} is not prepared{hint}; prepared: {listed}; run `mlx-slm prepare {name} SOURCE...`")
        return path


def plain_name(name: str) -> str:
    """Return `name` if it can name a set, a run or a model; raises SlmError for a path or an option."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise SlmError(f"{name!r} is not a name: a set, a run or a model is named with letters, digits and . _ + -")
    return name


def _named(folder: Path, name: str) -> Path:
    """The directory of this name; raises SlmError where a disk that ignores case has it under another one."""
    path = folder / plain_name(name)
    if path.exists():
        known = {unicodedata.normalize("NFC", entry) for entry in os.listdir(folder)}
        if unicodedata.normalize("NFC", name) not in known:
            other = next((entry for entry in known if entry.casefold() == name.casefold()), "another one")
            raise SlmError(f"{name!r} is {other!r} in {folder} on this disk, which ignores case: choose another name")
    return path

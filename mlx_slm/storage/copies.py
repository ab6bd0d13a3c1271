"""Directories that one of several ranks has, and that others need where they share no files."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np

from mlx_slm.machine.ranks import BUFFER, ranks
from mlx_slm.storage.artifacts import replace_directory


def copy_from(holder: int, path: Path, wanted: bool) -> None:
    """Put the directory that the rank `holder` has at its `path` there on each rank that wants it, whole or not at all.

    All ranks take part: what one sends goes round as a sum.
    """
    together = ranks()
    has, new = together.rank == holder, path.with_name(f".{path.name}.new")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if has else []
    listed = together.of_all({file.relative_to(path).as_posix(): file.stat().st_size for file in files})[holder]
    if wanted:
        shutil.rmtree(new, ignore_errors=True)
    for name, size in listed.items():
        with contextlib.ExitStack() as opened:
            source = opened.enter_context(open(path / name, "rb")) if has else None
            if wanted:
                (new / name).parent.mkdir(parents=True, exist_ok=True)
            target = opened.enter_context(open(new / name, "wb")) if wanted else None
            for start in range(0, size, BUFFER):
                length = min(BUFFER, size - start)
                piece = source.read(length) if source else bytes(length)
                piece = together.sum_of_all(np.frombuffer(piece, np.uint8)).tobytes()
                if target:
                    target.write(piece)
    if wanted:
        replace_directory(new, path)

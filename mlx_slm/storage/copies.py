"""Directories that one of several ranks has, and that others need where they share no files."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlx_slm.errors import SlmError
from mlx_slm.machine.ranks import BUFFER, ranks
from mlx_slm.storage.artifacts import replace_directory, sync


def copy_from(holder: int, path: Path, wanted: Callable[[], bool]) -> None:
    """Put the directory that the rank `holder` has at its `path` there on each rank that wants it, whole or not at all.

    All ranks take part: what one sends goes round as a sum. Of those that share files one puts it there. Raises
    SlmError, on all, where it changes meanwhile.
    """
    together, mine = ranks(), wanted()
    if together.agree(not mine):
        return
    has, new = together.rank == holder, path.with_name(f".{path.name}.of-{together.rank}.new")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if has else []
    sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
    changed = False

    def place() -> None:
        if mine and wanted():
            replace_directory(new, path)

    try:
        for name, size in together.of_all(sizes)[holder].items():
            with contextlib.ExitStack() as opened:
                source = target = None
                if has:
                    with contextlib.suppress(OSError):
                        source = opened.enter_context(open(path / name, "rb"))
                if mine:
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    target = opened.enter_context(open(new / name, "wb"))
                for start in range(0, size, BUFFER):
                    length = min(BUFFER, size - start)
                    piece = source.read(length) if source else b""
                    changed |= has and len(piece) < length
                    piece = together.sum_of_all(np.frombuffer(piece.ljust(length, b"\0"), np.uint8)).tobytes()
                    if target:
                        target.write(piece)
            if mine:
                sync(new / name)
        if not together.agree(not changed):
            raise SlmError(
                f"{path} of rank {holder} ({together.hosts[holder]}) changed while it was copied: wait until nothing "
                "trains it, then run the same command again"
            )
        together.in_turn(place)
    finally:
        shutil.rmtree(new, ignore_errors=True)

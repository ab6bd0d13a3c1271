"""Locks between processes: one trains a run, one prepares, one clusters; a set that is read is not replaced.

A process loses its locks when it ends, however it does.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_slm.errors import Busy
from mlx_slm.storage.workspace import Workspace, plain_name


@contextlib.contextmanager
def alone(lock: Path, busy: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock file; a process loses it when it ends.

    If another process has it: with `waiting` call that and wait, else raise Busy with the text `busy`.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if waiting is None:
                raise Busy(busy) from error
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def in_use(workspace: Workspace, *names: str) -> Iterator[None]:
    """While a training reads sets nobody rebuilds them. Several may read them."""
    with contextlib.ExitStack() as held:
        for name in names:
            fcntl.flock(held.enter_context(_set_lock(workspace, name)), fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def unused(workspace: Workspace, name: str) -> Iterator[None]:
    """While a set is replaced nobody reads it; raises Busy where a training does."""
    with _set_lock(workspace, name) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(
                f"set {name!r} is in use by another process, which trains on it: wait until it ends, then run the same "
                "command again; what was read is kept"
            ) from error
        yield


def _set_lock(workspace: Workspace, name: str):
    lock = workspace.root / "data" / f".{plain_name(name)}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    return open(lock, "w")

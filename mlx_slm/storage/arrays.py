"""Arrays on disk: safetensors, as nested dicts of MLX arrays."""

from __future__ import annotations

import errno
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_slm.files import require_safetensors, write_arrays
from mlx_slm.machine.trees import flat, nested


def save_arrays(path: Path, tree: dict, metadata: dict[str, str] | None = None) -> None:
    """Write a nested dict of arrays as safetensors; raises OSError where the disk does not take it."""
    values = flat(tree)
    if any(value.dtype == mx.bfloat16 for value in values.values()):  # which numpy has no name for
        try:
            mx.save_safetensors(str(path), values, metadata or {})
        except RuntimeError as error:
            raise OSError(errno.EIO, str(error), str(path)) from error
        return
    arrays = {name: np.ascontiguousarray(np.array(value, copy=False)) for name, value in values.items()}
    write_arrays(path, arrays, metadata)


def load_arrays(path: Path) -> dict:
    """Read safetensors as a nested dict of arrays."""
    return nested(read_safetensors(path))


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """Arrays by name; raises SlmError, naming the file, for one that cannot be read."""
    require_safetensors(path)
    return dict(mx.load(str(path)))  # type: ignore[arg-type]

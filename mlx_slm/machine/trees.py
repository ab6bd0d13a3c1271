"""Nested dicts of arrays, and the same by the paths of their leaves."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten


def flat(tree) -> dict[str, mx.array]:
    """The arrays of a tree by their paths, such as `model.layers.0.mlp.up_proj.weight`."""
    return dict(tree_flatten(tree))


def nested(arrays: dict[str, mx.array] | Iterable[tuple[str, mx.array]]) -> dict:
    """The tree whose leaves have these paths."""
    tree = tree_unflatten(list(arrays.items() if isinstance(arrays, dict) else arrays))
    assert isinstance(tree, dict)
    return tree

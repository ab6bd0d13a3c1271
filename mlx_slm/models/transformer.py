"""The transformer: token ids go in, hidden states come out. Its body is that of a family (`models.families`).

The loss and the evaluation apply the head in chunks, so that the logits never exist at once.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlx_slm.machine.trees import flat, nested
from mlx_slm.models.families import FAMILIES
from mlx_slm.models.shape import Shape


class Transformer(nn.Module):
    """tokens int [B, L] -> hidden states [B, L, dims], in the dtype of its matrices (`for_products`)."""

    def __init__(self, shape: Shape, recompute_layers: bool = False):
        super().__init__()
        self.shape = shape
        self.model = FAMILIES[shape.family].body(shape)
        if not shape.tied:
            self.lm_head = nn.Linear(shape.dims, shape.vocab_size, bias=False)
        self._run_layer = run_recomputed if recompute_layers else run_plain

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.model(tokens, self._run_layer)

    @property
    def head(self) -> mx.array:
        """The output matrix [vocab_size, dims]; that of a tied model is the embeddings', in fp32 (`for_products`)."""
        if not self.shape.tied:
            return self.lm_head.weight
        return self.model[FAMILIES[self.shape.family].embedding].weight

    def logits(self, tokens: mx.array) -> mx.array:
        """All logits [B, L, vocab_size]: for small inputs and tests."""
        hidden = self(tokens)
        return hidden @ self.head.astype(hidden.dtype).T


LOOKED_UP = tuple({name for family in FAMILIES.values() for name in family.looked_up})


def for_products(parameters: dict, dtype: mx.Dtype) -> dict:
    """Parameters of a transformer that computes in `dtype`: its matrices are cast, what is looked up or added is not.

    Autodiff adds up the gradients of embeddings, positions, biases and norms over all tokens in their own dtype; in
    bf16 a sum of a few hundred numbers stands still (docs/gpu.md).
    """
    cast = lambda name, p: p if p.ndim == 1 or name.endswith(LOOKED_UP) else p.astype(dtype)  # noqa: E731
    return tree_map_with_path(cast, parameters)


def run_plain(layer: nn.Module, x: mx.array) -> mx.array:
    return layer(x)


def run_recomputed(layer: nn.Module, x: mx.array) -> mx.array:
    """Keep only the layer's input; the backward pass computes the rest again."""

    def inner(parameters, x):
        layer.update(parameters)
        return layer(x)

    return mx.checkpoint(inner)(layer.trainable_parameters(), x)


def parameter_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shapes of a transformer's parameters by their flat names."""
    return {name: value.shape for name, value in flat(Transformer(shape).parameters()).items()}


def initialise(shape: Shape, seed: int) -> dict:
    """Fresh fp32 parameters as a nested dict, GPT's way: N(0, 0.02), the two projections into the residual stream
    divided by sqrt(2 * num_layers), biases 0, norms 1. For a seed the same random bits on every backend; the normal
    numbers made of them differ in their last digits."""
    into_residual = FAMILIES[shape.family].into_residual
    key = mx.random.key(seed)
    parameters = []
    for name, value in sorted(flat(Transformer(shape).parameters()).items(), key=lambda item: item[0]):
        module, kind = name.split(".")[-2:]
        if kind == "bias":
            made = mx.zeros(value.shape)
        elif "norm" in module or module.startswith("ln_"):
            made = mx.ones(value.shape)
        else:
            key, use = mx.random.split(key)
            scale = 0.02 / ((2 * shape.num_layers) ** 0.5 if module in into_residual else 1.0)
            made = mx.random.normal(value.shape, scale=scale, key=use)
        parameters.append((name, made))
    return nested(parameters)

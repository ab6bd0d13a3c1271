"""LoRA on the query and value projections (appendix F): W + scale * (A B)^T, W frozen, A and B trained.

Rank 64 on two d x d matrices a layer gives the paper's 5.05M trainable parameters. Adapters are written as mlx-lm has
them, so that `mlx_lm.generate --adapter-path` reads them: `adapters.safetensors` and `adapter_config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_slm.machine.trees import flat, nested
from mlx_slm.models.families import FAMILIES
from mlx_slm.models.family import Adapted
from mlx_slm.models.shape import Shape


@dataclass(frozen=True)
class Lora:
    """Adapters of rank `rank` for a transformer of `shape`; what they add is multiplied by `scale`.

    Their parameters are `{"<name>.a": fp32 [in, rank], "<name>.b": fp32 [rank, out]}`, flat or as a tree.
    """

    shape: Shape
    rank: int
    scale: float

    def __post_init__(self):
        if not 0 < self.rank <= self.shape.dims:
            raise ValueError(f"a rank from 1 to {self.shape.dims}, not {self.rank}")

    @property
    def targets(self) -> list[Adapted]:
        """(adapter, matrix, first row, rows) of everything that is adapted."""
        family = FAMILIES[self.shape.family]
        return [target for layer in range(self.shape.num_layers) for target in family.lora_targets(self.shape, layer)]

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(self.rank * (self.shape.dims + rows) for *_, rows in self.targets)

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs of a token: forward and back through everything, weight gradients of what is adapted, and of
        the head, which the cross-entropy makes in any case."""
        made = self._adapted_size + self.shape.vocab_size * self.shape.dims
        return self.shape.flops_per_token - 2 * (self.shape.product_parameters - made)

    @property
    def bytes_spared(self) -> int:
        """Memory that a step spares against one of all weights: moments, successors and gradients of the frozen, less
        the adapted matrices with what is added, and their gradients."""
        return 4 * 6 * (self.shape.num_parameters - self.num_parameters) - 4 * 2 * self._adapted_size

    @property
    def _adapted_size(self) -> int:
        """Numbers in the matrices that are adapted; a joint one is made, and has its gradient, as a whole."""
        ends: dict[str, int] = {}
        for _, matrix, first, rows in self.targets:
            ends[matrix] = max(first + rows, ends.get(matrix, 0))
        return self.shape.dims * sum(ends.values())

    def initialise(self, seed: int) -> dict:
        """A uniform within 1 / sqrt(in) and B zero, as mlx-lm begins: at first nothing is added."""
        d = self.shape.dims
        adapters: dict[str, mx.array] = {}
        for (name, *_, rows), key in zip(
            self.targets, mx.random.split(mx.random.key(seed), len(self.targets)), strict=True
        ):
            a = mx.random.uniform(-(d**-0.5), d**-0.5, (d, self.rank), key=key)
            adapters |= {f"{name}.a": a, f"{name}.b": mx.zeros((self.rank, rows))}
        return adapters

    def applied(self, base: dict, adapters: dict) -> dict:
        """Parameters of a plain transformer: those of `base` with what the adapters add."""
        weights, adapters = flat(base), flat(adapters)
        for name, matrix, first, rows in self.targets:
            added = self.scale * (adapters[f"{name}.b"].T @ adapters[f"{name}.a"].T)
            if rows < len(weights[matrix]):
                below = len(weights[matrix]) - first - rows
                added = mx.pad(added, [(first, below), (0, 0)])
            weights[matrix] = weights[matrix] + added
        return nested(weights)

    def to_mlx_lm(self, adapters: dict) -> tuple[dict[str, mx.array], dict]:
        """(arrays, configuration) in mlx-lm's adapter format."""
        arrays, keys, ranks = FAMILIES[self.shape.family].lora_to_mlx_lm(self.shape, flat(adapters))
        parameters = {"rank": ranks * self.rank, "scale": self.scale, "dropout": 0.0, "keys": keys}
        return arrays, {
            "fine_tune_type": "lora",
            "num_layers": self.shape.num_layers,
            "lora_parameters": parameters,
        }

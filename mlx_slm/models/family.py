"""What a family of transformers has to say about itself. Each family is one file; `families` lists them.

A family is a body (token ids -> hidden states), what its matrices count and are called, and how it lies on the Hub.
Names in memory are those of mlx-lm, so that every export runs there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_slm.fields import Form
from mlx_slm.machine.trees import nested

if TYPE_CHECKING:
    from mlx_slm.models.shape import Heads, Shape

Adapted = tuple[str, str, int, int]
"""(adapter, matrix, first row, rows) of what LoRA adapts: a block of rows of a matrix."""


class Family(ABC):
    name: ClassVar[str]
    """As in a configuration, and `model_type` on the Hub."""
    summary: ClassVar[str]
    embedding: ClassVar[str]
    """The module of the body that holds the token embeddings."""
    looked_up: ClassVar[tuple[str, ...]]
    """How the names of matrices end whose rows are looked up, not multiplied."""
    into_residual: ClassVar[tuple[str, ...]]
    """Modules that write into the residual stream, which begin smaller."""
    projected: ClassVar[tuple[str, ...]]
    """The matrices of an MLP, which SLM-pn projects; `{}` is the layer."""
    gguf_names: ClassVar[dict[str, str]]
    """Parts of the names of parameters, and what llama.cpp calls them."""
    form: ClassVar[type[Form]]
    """config.json on the Hub."""
    architecture: ClassVar[str]
    """The class of transformers."""
    computes: ClassVar[dict[str, Any]]
    """What this code computes; a config.json that says otherwise is refused."""

    learned_positions: ClassVar[bool] = False
    """Whether a model can only read as long a text as it was trained on."""

    @abstractmethod
    def body(self, shape: Shape) -> nn.Module:
        """Called with (tokens [B, L], run_layer), it gives hidden states [B, L, dims]."""

    @abstractmethod
    def default_hidden_dims(self, dims: int) -> int:
        """The inner size of an MLP where none is given."""

    def check(self, of: Heads) -> None:
        """Raise ValueError for numbers that do not fit together in this family."""
        if of.num_kv_heads and of.num_heads % of.num_kv_heads:
            raise ValueError(f"num_heads {of.num_heads} is not a multiple of num_kv_heads {of.num_kv_heads}")

    @abstractmethod
    def layer_products(self, shape: Shape) -> int:
        """Weights of a layer that a token is multiplied with."""

    @abstractmethod
    def layer_vectors(self, shape: Shape) -> int:
        """Numbers of a layer that are added or scale: biases and norms."""

    @abstractmethod
    def other_parameters(self, shape: Shape) -> int:
        """Numbers outside of layers and head: positions and the last norm."""

    @abstractmethod
    def lora_targets(self, shape: Shape, layer: int) -> list[Adapted]:
        """The query and the value projection of a layer."""

    @abstractmethod
    def lora_to_mlx_lm(self, shape: Shape, adapters: dict[str, mx.array]) -> tuple[dict[str, mx.array], list[str], int]:
        """(arrays, keys, ranks in one) as mlx-lm has adapters: its rank is ours times the last number."""

    @abstractmethod
    def to_hub_config(self, shape: Shape) -> dict:
        """What config.json says of a shape, beyond what all families say."""

    @abstractmethod
    def from_hub_config(self, config: dict) -> dict:
        """The fields of a Shape that config.json decides, all but `context_length`."""

    def refused(self, config: dict) -> list[str]:
        """What in a config.json is not supported, beyond `computes`."""
        return []

    def to_hub(self, parameters: dict) -> dict:
        """Names and layout of the Hub."""
        return parameters

    def from_hub(self, weights: dict[str, mx.array]) -> dict:
        """The inverse of `to_hub`, as a tree; of what other programs wrote as well."""
        return nested(weights)

    def to_gguf(self, shape: Shape, parameters: dict[str, mx.array]) -> dict[str, mx.array]:
        """Parameters by flat name -> tensors as llama.cpp's architecture of the same name calls and lays them out."""
        tensors = {}
        for name, value in parameters.items():
            for here, there in self.gguf_names.items():
                name = name.replace(here, there)
            tensors[name] = value
        return tensors

    def gguf_facts(self, shape: Shape) -> dict[str, int | float]:
        """What a GGUF file says of a shape, under the name of its architecture."""
        return {
            "context_length": shape.context_length,
            "embedding_length": shape.dims,
            "block_count": shape.num_layers,
            "feed_forward_length": shape.hidden_dims,
            "attention.head_count": shape.num_heads,
        }

    def cut(self, weights: dict[str, mx.array], context_length: int) -> dict[str, mx.array]:
        """Weights of the Hub for windows of `context_length` tokens."""
        return weights

"""The qwen3 family: a llama whose queries and keys are normalised head by head, with heads of a size of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_slm.models import llama
from mlx_slm.models.layers import RMSNorm

if TYPE_CHECKING:
    from mlx_slm.models.shape import Shape


class Attention(llama.Attention):
    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.q_norm = RMSNorm(shape.head_dims, eps=shape.norm_eps)
        self.k_norm = RMSNorm(shape.head_dims, eps=shape.norm_eps)

    def project_queries(self, x: mx.array) -> mx.array:
        return self.q_norm(super().project_queries(x))

    def project_keys(self, x: mx.array) -> mx.array:
        return self.k_norm(super().project_keys(x))


class Body(llama.Body):
    attention = Attention


class Qwen3(llama.Llama):
    name, summary = "qwen3", "as llama, with normalised queries and keys and head_dims of its own"
    architecture, turned, rope_types = "Qwen3ForCausalLM", False, ("default",)
    computes: ClassVar = {"hidden_act": "silu", "use_sliding_window": False}

    def refused(self, config: dict) -> list[str]:
        biased = ["attention_bias is True"] if config.get("attention_bias") else []
        return [*super().refused(config), *biased]

    def body(self, shape: Shape) -> nn.Module:
        return Body(shape)

    def layer_vectors(self, shape: Shape) -> int:
        return 2 * shape.dims + 2 * shape.head_dims

    def from_hub_config(self, config: dict) -> dict:
        return super().from_hub_config(config) | {"head_dims": config.get("head_dim", 128)}

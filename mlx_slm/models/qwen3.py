"""The qwen3 family: a llama whose queries and keys are normalised head by head, with heads of a size of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_slm.models import llama
from mlx_slm.models.family import Family
from mlx_slm.models.layers import RMSNorm

if TYPE_CHECKING:
    from mlx_slm.models.shape import Heads, Shape


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
    architecture, turned = "Qwen3ForCausalLM", False
    computes: ClassVar = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}

    def body(self, shape: Shape) -> nn.Module:
        return Body(shape)

    def check(self, of: Heads) -> None:
        head_dims = of.head_dims or of.dims // of.num_heads
        if not of.head_dims and of.dims % of.num_heads:
            raise ValueError(f"dims {of.dims} is not a multiple of num_heads {of.num_heads}: give head_dims")
        if head_dims % 2:
            raise ValueError(f"head_dims {head_dims} must be even for rotary positions")
        Family.check(self, of)

    def layer_vectors(self, shape: Shape) -> int:
        return 2 * shape.dims + 2 * shape.head_dims

    def from_hub_config(self, config: dict) -> dict:
        return super().from_hub_config(config) | {"head_dims": config.get("head_dim", 128)}

    def takes_head_dim(self, config: dict) -> bool:
        return True

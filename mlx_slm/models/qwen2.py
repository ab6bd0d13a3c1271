"""The qwen2 family (Qwen2, Qwen2.5): a llama whose queries, keys and values have biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import mlx.nn as nn

from mlx_slm.models import llama
from mlx_slm.models.layers import Linear

if TYPE_CHECKING:
    from mlx_slm.models.shape import Heads, Shape


class Attention(llama.Attention):
    def __init__(self, shape: Shape):
        super().__init__(shape)
        for name, heads in (
            ("q_proj", shape.num_heads),
            ("k_proj", shape.num_kv_heads),
            ("v_proj", shape.num_kv_heads),
        ):
            setattr(self, name, Linear(shape.dims, heads * shape.head_dims, bias=True))


class Body(llama.Body):
    attention = Attention


class Qwen2(llama.Llama):
    name, summary = "qwen2", "as llama, with biases on queries, keys and values"
    architecture, turned, rope_types = "Qwen2ForCausalLM", False, ("default",)
    optional_bias = False
    computes: ClassVar = {"hidden_act": "silu", "use_sliding_window": False}

    def body(self, shape: Shape) -> nn.Module:
        return Body(shape)

    def check(self, of: Heads) -> None:
        if of.dims % of.num_heads:
            raise ValueError(f"dims {of.dims} is not a multiple of num_heads {of.num_heads}")
        if of.head_dims not in (None, of.dims // of.num_heads):
            raise ValueError(f"head_dims is dims / num_heads = {of.dims // of.num_heads} for family {self.name}")
        super().check(of)

    def layer_vectors(self, shape: Shape) -> int:
        return 2 * shape.dims + (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dims

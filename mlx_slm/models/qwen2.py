"""The qwen2 family (Qwen2, Qwen2.5): a llama whose queries, keys and values have biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import mlx.nn as nn

from mlx_slm.models import llama
from mlx_slm.models.layers import Linear

if TYPE_CHECKING:
    from mlx_slm.models.shape import Shape


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
    architecture, turned = "Qwen2ForCausalLM", False
    computes: ClassVar = {"hidden_act": "silu", "use_sliding_window": False}

    def body(self, shape: Shape) -> nn.Module:
        return Body(shape)

    def layer_vectors(self, shape: Shape) -> int:
        return 2 * shape.dims + (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dims

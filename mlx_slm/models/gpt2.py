"""The gpt2 family: LayerNorm, learned positions, GELU MLP of 4 * dims, tied head; it fits the paper's counts.

On the Hub its matrices lie the other way round (Conv1D: [in, out]), and names have no prefix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import mlx.core as mx
import mlx.nn as nn
from pydantic import Field, StrictBool, StrictFloat, StrictInt

from mlx_slm.fields import MAX_LAYERS, Form, StrictDimension
from mlx_slm.machine.trees import flat
from mlx_slm.models.family import Adapted, Family
from mlx_slm.models.layers import LayerNorm, Linear, attend, split_heads
from mlx_slm.models.ops import gelu

if TYPE_CHECKING:
    from mlx_slm.models.shape import Heads, Shape

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


GGUF_NAMES = {
    "model.h.": "blk.",
    "model.wte.": "token_embd.",
    "model.wpe.": "position_embd.",
    "model.ln_f.": "output_norm.",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.num_heads, self.scale = shape.num_heads, shape.head_dims**-0.5
        self.c_attn = Linear(shape.dims, 3 * shape.dims)
        self.c_proj = Linear(shape.dims, shape.dims)

    def __call__(self, x: mx.array) -> mx.array:
        q, k, v = (split_heads(part, self.num_heads) for part in mx.split(self.c_attn(x), 3, axis=-1))
        return self.c_proj(attend(q, k, v, self.scale))


class MLP(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.c_fc = Linear(shape.dims, shape.hidden_dims)
        self.c_proj = Linear(shape.hidden_dims, shape.dims)

    def __call__(self, x: mx.array) -> mx.array:
        return self.c_proj(gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.attn = Attention(shape)
        self.mlp = MLP(shape)
        self.ln_1 = LayerNorm(shape.dims, eps=shape.norm_eps)
        self.ln_2 = LayerNorm(shape.dims, eps=shape.norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        h = x + self.attn(self.ln_1(x))
        return h + self.mlp(self.ln_2(h))


class Body(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.dims)
        self.wpe = nn.Embedding(shape.context_length, shape.dims)
        self.h = [Block(shape) for _ in range(shape.num_layers)]
        self.ln_f = LayerNorm(shape.dims, eps=shape.norm_eps)

    def __call__(self, tokens: mx.array, run_layer) -> mx.array:
        h = self.wte(tokens) + self.wpe(mx.arange(tokens.shape[1]))
        h = h.astype(self.h[0].attn.c_attn.weight.dtype)
        for layer in self.h:
            h = run_layer(layer, h)
        return self.ln_f(h)


class GPT2Form(Form):
    n_embd: StrictDimension
    n_head: StrictDimension
    n_layer: Annotated[StrictInt, Field(ge=1, le=MAX_LAYERS)]
    vocab_size: StrictDimension
    n_positions: StrictDimension | None = None
    n_inner: StrictDimension | None = None
    layer_norm_epsilon: Annotated[StrictFloat | StrictInt, Field(ge=0, le=1)] = 1e-5
    tie_word_embeddings: StrictBool = True


class GPT2(Family):
    name, summary = "gpt2", "LayerNorm, learned positions, GELU"
    embedding, looked_up = "wte", ("wte.weight", "wpe.weight")
    into_residual = ("c_proj",)
    learned_positions = True
    projected = ("model.h.{}.mlp.c_fc", "model.h.{}.mlp.c_proj")
    form, architecture, gguf_names = GPT2Form, "GPT2LMHeadModel", GGUF_NAMES
    computes: ClassVar = {
        "activation_function": "gelu_new",
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
    }

    def body(self, shape: Shape) -> nn.Module:
        return Body(shape)

    def default_hidden_dims(self, dims: int) -> int:
        return 4 * dims

    def check(self, of: Heads) -> None:
        if of.dims % of.num_heads:
            raise ValueError(f"dims {of.dims} is not a multiple of num_heads {of.num_heads}")
        super().check(of)
        if of.num_kv_heads not in (None, of.num_heads):
            raise ValueError("num_kv_heads is for other families than gpt2, which has as many as num_heads")
        if of.head_dims not in (None, of.dims // of.num_heads):
            raise ValueError(f"head_dims is dims / num_heads = {of.dims // of.num_heads} for family gpt2")
        if of.hidden_dims not in (None, 4 * of.dims):
            raise ValueError(f"hidden_dims is 4 * dims = {4 * of.dims} for family gpt2 (mlx-lm's gpt2 has no other)")

    def layer_products(self, shape: Shape) -> int:
        return 4 * shape.dims**2 + 2 * shape.dims * shape.hidden_dims

    def layer_vectors(self, shape: Shape) -> int:
        return shape.hidden_dims + 9 * shape.dims

    def other_parameters(self, shape: Shape) -> int:
        return shape.context_length * shape.dims + 2 * shape.dims

    def lora_targets(self, shape: Shape, layer: int) -> list[Adapted]:
        """Query, key and value are one matrix [3 d, d]: the query's and the value's rows have an adapter each."""
        matrix, d = f"model.h.{layer}.attn.c_attn", shape.dims
        return [(f"{matrix}.q", f"{matrix}.weight", 0, d), (f"{matrix}.v", f"{matrix}.weight", 2 * d, d)]

    def lora_to_mlx_lm(self, shape: Shape, adapters: dict[str, mx.array]) -> tuple[dict[str, mx.array], list[str], int]:
        """mlx-lm adapts the joint matrix as a whole. The same sum has twice the rank there: A is [A_q, A_v], and B has
        B_q and B_v in their blocks and zeros for the rest."""
        arrays: dict[str, mx.array] = {}
        d = shape.dims
        for layer in range(shape.num_layers):
            matrix = f"model.h.{layer}.attn.c_attn"
            b = [
                mx.pad(adapters[f"{matrix}.q.b"], [(0, 0), (0, 2 * d)]),
                mx.pad(adapters[f"{matrix}.v.b"], [(0, 0), (2 * d, 0)]),
            ]
            a = [adapters[f"{matrix}.q.a"], adapters[f"{matrix}.v.a"]]
            arrays |= {f"{matrix}.lora_a": mx.concatenate(a, axis=1), f"{matrix}.lora_b": mx.concatenate(b)}
        return arrays, ["attn.c_attn"], 2

    def to_hub_config(self, shape: Shape) -> dict:
        return {
            "n_ctx": shape.context_length,
            "n_positions": shape.context_length,
            "n_embd": shape.dims,
            "n_head": shape.num_heads,
            "n_layer": shape.num_layers,
            "n_inner": shape.hidden_dims,
            "layer_norm_epsilon": shape.norm_eps,
            "activation_function": "gelu_new",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }

    def from_hub_config(self, config: dict) -> dict:
        return {
            "num_layers": config["n_layer"],
            "dims": config["n_embd"],
            "hidden_dims": 4 * config["n_embd"],
            "num_heads": config["n_head"],
            "num_kv_heads": config["n_head"],
            "vocab_size": config["vocab_size"],
            "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        }

    def gguf_facts(self, shape: Shape) -> dict[str, int | float]:
        return super().gguf_facts(shape) | {"attention.layer_norm_epsilon": float(shape.norm_eps)}

    def refused(self, config: dict) -> list[str]:
        reasons = []
        if config.get("n_inner") not in (None, 4 * config["n_embd"]):
            reasons.append(f"n_inner is {config['n_inner']}, mlx-lm reads 4 * n_embd only")
        if not config.get("tie_word_embeddings", True):
            reasons.append("tie_word_embeddings is False")
        return reasons

    def to_hub(self, parameters: dict) -> dict:
        named = {name.removeprefix("model."): value for name, value in flat(parameters).items()}
        return {name: mx.contiguous(value.T) if name.endswith(TRANSPOSED) else value for name, value in named.items()}

    def from_hub(self, weights: dict[str, mx.array]) -> dict:
        prefixed = {n if n.startswith("lm_head") else f"model.{n}": v for n, v in weights.items()}
        return super().from_hub({n: v.T if n.endswith(TRANSPOSED) else v for n, v in prefixed.items()})

    def cut(self, weights: dict[str, mx.array], context_length: int) -> dict[str, mx.array]:
        """Names and layout of the Hub, from its own files, from transformers' or from mlx-lm's; the first positions."""
        if any(name.startswith("model.") for name in weights):
            weights = self.to_hub({name: value for name, value in weights.items() if name.startswith("model.")})
        named = {name.removeprefix("transformer."): value for name, value in weights.items()}
        if "wpe.weight" in named:
            named["wpe.weight"] = named["wpe.weight"][:context_length]
        return named

"""The llama family: RMSNorm, rotary positions, SwiGLU, as many heads of keys and values as are asked for, of any size;
as published also with biases in attention and with stretched positions."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, ClassVar

import mlx.core as mx
import mlx.nn as nn
from pydantic import Field, StrictBool, StrictInt, StrictStr, model_validator

from mlx_slm.fields import MAX_LAYERS, Form, StrictDimension, StrictNormEps, StrictRopeTheta
from mlx_slm.models.family import Adapted, Family
from mlx_slm.models.layers import Linear, RMSNorm, attend, split_heads
from mlx_slm.models.ops import swiglu
from mlx_slm.models.rope import Positive, RopeScalingForm, ScaledRope

if TYPE_CHECKING:
    from mlx_slm.models.shape import Heads, Shape


GGUF_NAMES = {
    "model.layers.": "blk.",
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.num_heads, self.num_kv_heads = shape.num_heads, shape.num_kv_heads
        d, width, kv_width = shape.dims, shape.num_heads * shape.head_dims, shape.num_kv_heads * shape.head_dims
        self.scale = shape.head_dims**-0.5
        self.q_proj = Linear(d, width, bias=shape.attention_bias)
        self.k_proj = Linear(d, kv_width, bias=shape.attention_bias)
        self.v_proj = Linear(d, kv_width, bias=shape.attention_bias)
        self.o_proj = Linear(width, d, bias=shape.attention_bias)
        scaling, theta = shape.rope_scaling, shape.rope_theta
        self.rope = ScaledRope(shape.head_dims, theta, scaling) if scaling else nn.RoPE(shape.head_dims, base=theta)

    def project_queries(self, x: mx.array) -> mx.array:
        """[B, num_heads, L, head_dims], before their positions."""
        return split_heads(self.q_proj(x), self.num_heads)

    def project_keys(self, x: mx.array) -> mx.array:
        """[B, num_kv_heads, L, head_dims], before their positions."""
        return split_heads(self.k_proj(x), self.num_kv_heads)

    def __call__(self, x: mx.array) -> mx.array:
        q, k = self.rope(self.project_queries(x)), self.rope(self.project_keys(x))
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        return self.o_proj(attend(q, k, v, self.scale))


class MLP(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = Linear(shape.dims, shape.hidden_dims, bias=False)
        self.up_proj = Linear(shape.dims, shape.hidden_dims, bias=False)
        self.down_proj = Linear(shape.hidden_dims, shape.dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, shape: Shape, attention: type[Attention]):
        super().__init__()
        self.self_attn = attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.dims, eps=shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.dims, eps=shape.norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x))
        return h + self.mlp(self.post_attention_layernorm(h))


class Body(nn.Module):
    attention: type[Attention] = Attention

    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.dims)
        self.layers = [Block(shape, self.attention) for _ in range(shape.num_layers)]
        self.norm = RMSNorm(shape.dims, eps=shape.norm_eps)

    def __call__(self, tokens: mx.array, run_layer) -> mx.array:
        h = self.embed_tokens(tokens).astype(self.layers[0].self_attn.q_proj.weight.dtype)
        for layer in self.layers:
            h = run_layer(layer, h)
        return self.norm(h)


class RopeForm(Form):
    rope_type: StrictStr | None = None
    type: StrictStr | None = None
    rope_theta: StrictRopeTheta | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: StrictDimension | None = None

    @model_validator(mode="after")
    def scaling_is_whole(self) -> RopeForm:
        if "llama3" not in (self.rope_type, self.type):
            return self
        if missing := [key for key in RopeScalingForm.model_fields if getattr(self, key) is None]:
            raise ValueError(f"rope_type llama3 needs {', '.join(missing)}")
        RopeScalingForm.require_order(self.low_freq_factor, self.high_freq_factor)
        return self


class LlamaForm(Form):
    hidden_size: StrictDimension
    num_hidden_layers: Annotated[StrictInt, Field(ge=1, le=MAX_LAYERS)]
    intermediate_size: StrictDimension
    num_attention_heads: StrictDimension
    num_key_value_heads: StrictDimension | None = None
    head_dim: StrictDimension | None = None
    vocab_size: StrictDimension
    max_position_embeddings: Annotated[StrictInt, Field(ge=1, le=1 << 30)] | None = None
    rope_theta: StrictRopeTheta | None = None
    rope_parameters: RopeForm | None = None
    rope_scaling: RopeForm | None = None
    rms_norm_eps: StrictNormEps = 1e-6
    tie_word_embeddings: StrictBool = False
    attention_bias: StrictBool | None = None


class Llama(Family):
    name, summary = "llama", "RMSNorm, RoPE, SwiGLU"
    embedding, looked_up = "embed_tokens", ("embed_tokens.weight",)
    into_residual = ("o_proj", "down_proj")
    projected = tuple(f"model.layers.{{}}.mlp.{part}_proj" for part in ("gate", "up", "down"))
    form, architecture = LlamaForm, "LlamaForCausalLM"
    gguf_names = GGUF_NAMES
    turned: ClassVar[bool] = True
    """Whether llama.cpp pairs neighbours in the rotary positions of this architecture."""
    optional_bias: ClassVar[bool] = True
    """Whether attention may have biases or not, on the output too."""
    rope_types: ClassVar[tuple[str, ...]] = ("default", "llama3")
    computes: ClassVar = {"hidden_act": "silu", "mlp_bias": False}

    def body(self, shape: Shape) -> nn.Module:
        return Body(shape)

    def default_hidden_dims(self, dims: int) -> int:
        return -(-dims * 8 // 192) * 64

    def check(self, of: Heads) -> None:
        if not of.head_dims and of.dims % of.num_heads:
            raise ValueError(f"dims {of.dims} is not a multiple of num_heads {of.num_heads}: give head_dims")
        head_dims = of.head_dims or of.dims // of.num_heads
        if head_dims % 2:
            raise ValueError(f"heads of {head_dims} numbers: rotary positions need an even size")
        super().check(of)

    def layer_products(self, shape: Shape) -> int:
        attention = 2 * shape.dims * shape.head_dims * (shape.num_heads + shape.num_kv_heads)
        return attention + 3 * shape.dims * shape.hidden_dims

    def layer_vectors(self, shape: Shape) -> int:
        biases = shape.dims + (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dims
        return 2 * shape.dims + (biases if shape.attention_bias else 0)

    def other_parameters(self, shape: Shape) -> int:
        return shape.dims

    def lora_targets(self, shape: Shape, layer: int) -> list[Adapted]:
        widths = {"q_proj": shape.num_heads * shape.head_dims, "v_proj": shape.num_kv_heads * shape.head_dims}
        names = {f"model.layers.{layer}.self_attn.{part}": width for part, width in widths.items()}
        return [(name, f"{name}.weight", 0, width) for name, width in names.items()]

    def lora_to_mlx_lm(self, shape: Shape, adapters: dict[str, mx.array]) -> tuple[dict[str, mx.array], list[str], int]:
        named = {f"{name[:-2]}.lora_{name[-1]}": value for name, value in adapters.items()}
        return named, ["self_attn.q_proj", "self_attn.v_proj"], 1

    def to_hub_config(self, shape: Shape) -> dict:
        return {
            "hidden_size": shape.dims,
            "intermediate_size": shape.hidden_dims,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dims,
            "max_position_embeddings": shape.context_length,
            "rms_norm_eps": shape.norm_eps,
            "rope_theta": shape.rope_theta,
            **self.computes,
            **({"attention_bias": True} if shape.attention_bias else {}),
            **({"rope_scaling": {"rope_type": "llama3", **asdict(shape.rope_scaling)}} if shape.rope_scaling else {}),
        }

    def from_hub_config(self, config: dict) -> dict:
        heads, rope = config["num_attention_heads"], _rope(config)
        return {
            "num_layers": config["num_hidden_layers"],
            "dims": config["hidden_size"],
            "hidden_dims": config["intermediate_size"],
            "num_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "vocab_size": config["vocab_size"],
            "head_dims": config.get("head_dim") or 0,
            "attention_bias": bool(config.get("attention_bias")) and self.optional_bias,
            "rope_theta": rope.get("rope_theta") or config.get("rope_theta", 10_000.0),
            "rope_scaling": {key: rope[key] for key in RopeScalingForm.model_fields}
            if _kind(rope) == "llama3"
            else None,
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "tied": config.get("tie_word_embeddings", False),
        }

    def gguf_facts(self, shape: Shape) -> dict[str, int | float]:
        return super().gguf_facts(shape) | {
            "attention.head_count_kv": shape.num_kv_heads,
            "attention.layer_norm_rms_epsilon": float(shape.norm_eps),
            "attention.key_length": shape.head_dims,
            "attention.value_length": shape.head_dims,
            "rope.dimension_count": shape.head_dims,
            "rope.freq_base": float(shape.rope_theta),
        }

    def to_gguf(self, shape: Shape, parameters: dict[str, mx.array]) -> dict[str, mx.array]:
        """Rotary pairs lie side by side there, half a head apart here."""
        if not self.turned:
            return super().to_gguf(shape, parameters)
        heads, turned = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads}, {}
        for name, value in parameters.items():
            if count := heads.get(name.split(".")[-2]):
                value = value.reshape(count, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
            turned[name] = value
        if shape.rope_scaling:
            turned["rope_freqs.weight"] = mx.array(shape.rope_scaling.factors(shape.head_dims, shape.rope_theta))
        return super().to_gguf(shape, turned)

    def refused(self, config: dict) -> list[str]:
        rope = _rope(config)
        return [] if _kind(rope) in self.rope_types else [f"rope_scaling is {rope}"]


def _rope(config: dict) -> dict:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _kind(rope: dict) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"

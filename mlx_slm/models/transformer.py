"""The transformer in two families, named in memory as mlx-lm names them, so that every export runs there.

`gpt2`: LayerNorm, learned positions, GELU MLP of 4 * dims, tied head (the shape that the paper's parameter counts fit).
`llama`: RMSNorm, rotary positions, SwiGLU, tied head. Token ids go in, hidden states come out; the loss and the
evaluation apply the head in chunks, so that the logits never exist at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlx_slm.config import ModelConfig
from mlx_slm.models.ops import added, causal_attention, gelu, scaled, swiglu


@dataclass(frozen=True)
class Shape:
    """Everything that decides a model's tensors."""

    family: str
    num_layers: int
    dims: int
    hidden_dims: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context_length: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True
    """Whether the output matrix is that of the input embeddings."""

    @classmethod
    def of(cls, config: ModelConfig, vocab_size: int, context_length: int) -> Shape:
        hidden = config.hidden_dims or (4 * config.dims if config.family == "gpt2" else -(-config.dims * 8 // 96) * 32)
        return cls(
            config.family,
            config.num_layers,
            config.dims,
            hidden,
            config.num_heads,
            config.num_kv_heads or config.num_heads,
            vocab_size,
            context_length,
            config.rope_theta,
            config.norm_eps,
        )

    @property
    def num_parameters(self) -> int:
        """The exact count, without making the model."""
        d, hidden, kv = self.dims, self.hidden_dims, self.dims // self.num_heads * self.num_kv_heads
        heads = self.vocab_size * d * (1 if self.tied else 2)
        if self.family == "gpt2":
            layer = 4 * d * d + 4 * d + 2 * d * hidden + hidden + d + 4 * d
            return self.num_layers * layer + heads + self.context_length * d + 2 * d
        layer = 2 * d * d + 2 * d * kv + 3 * d * hidden + 2 * d
        return self.num_layers * layer + heads + d

    @property
    def product_parameters(self) -> int:
        """N: weights that a token is multiplied with. The input embedding and positions are looked up, not multiplied;
        biases and norms do not count."""
        d, kv = self.dims, self.dims // self.num_heads * self.num_kv_heads
        mlp = (2 if self.family == "gpt2" else 3) * d * self.hidden_dims
        return self.num_layers * (2 * d * d + 2 * d * kv + mlp) + self.vocab_size * d

    @property
    def forward_flops_per_token(self) -> int:
        """2 N for the products with weights and 4 L T d for attention over a full context."""
        return 2 * self.product_parameters + 4 * self.num_layers * self.context_length * self.dims

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs of a token, 6 N + 12 L T d: forward, and twice that backward."""
        return 3 * self.forward_flops_per_token

    def to_dict(self) -> dict:
        return asdict(self)


class Linear(nn.Linear):
    """A linear layer whose weight may be a stack [groups, out, in]: then each group of rows has its own."""

    def __call__(self, x: mx.array) -> mx.array:
        if self.weight.ndim == 2:
            out = x @ self.weight.T
        else:
            grouped = x.reshape(self.weight.shape[0], -1, x.shape[-1]) @ self.weight.swapaxes(-1, -2)
            out = grouped.reshape(*x.shape[:-1], -1)
        return added(out, self.bias) if "bias" in self else out


class RMSNorm(nn.RMSNorm):
    def __call__(self, x: mx.array) -> mx.array:
        return scaled(mx.fast.rms_norm(x, None, self.eps), self.weight)


class LayerNorm(nn.LayerNorm):
    def __call__(self, x: mx.array) -> mx.array:
        return added(scaled(mx.fast.layer_norm(x, None, None, self.eps), self.weight), self.bias)


class LlamaAttention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        d, self.num_heads, self.num_kv_heads = shape.dims, shape.num_heads, shape.num_kv_heads
        head_dims = d // shape.num_heads
        self.scale = head_dims**-0.5
        self.q_proj = Linear(d, d, bias=False)
        self.k_proj = Linear(d, shape.num_kv_heads * head_dims, bias=False)
        self.v_proj = Linear(d, shape.num_kv_heads * head_dims, bias=False)
        self.o_proj = Linear(d, d, bias=False)
        self.rope = nn.RoPE(head_dims, base=shape.rope_theta)

    def __call__(self, x: mx.array) -> mx.array:
        q = self.rope(split_heads(self.q_proj(x), self.num_heads))
        k = self.rope(split_heads(self.k_proj(x), self.num_kv_heads))
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        return self.o_proj(attend(q, k, v, self.scale))


class LlamaMLP(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = Linear(shape.dims, shape.hidden_dims, bias=False)
        self.up_proj = Linear(shape.dims, shape.hidden_dims, bias=False)
        self.down_proj = Linear(shape.hidden_dims, shape.dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class LlamaBlock(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.self_attn = LlamaAttention(shape)
        self.mlp = LlamaMLP(shape)
        self.input_layernorm = RMSNorm(shape.dims, eps=shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.dims, eps=shape.norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x))
        return h + self.mlp(self.post_attention_layernorm(h))


class LlamaBody(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.dims)
        self.layers = [LlamaBlock(shape) for _ in range(shape.num_layers)]
        self.norm = RMSNorm(shape.dims, eps=shape.norm_eps)

    def __call__(self, tokens: mx.array, run_layer) -> mx.array:
        h = self.embed_tokens(tokens).astype(self.layers[0].self_attn.q_proj.weight.dtype)
        for layer in self.layers:
            h = run_layer(layer, h)
        return self.norm(h)


class GPT2Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.num_heads, self.scale = shape.num_heads, (shape.dims // shape.num_heads) ** -0.5
        self.c_attn = Linear(shape.dims, 3 * shape.dims)
        self.c_proj = Linear(shape.dims, shape.dims)

    def __call__(self, x: mx.array) -> mx.array:
        q, k, v = (split_heads(part, self.num_heads) for part in mx.split(self.c_attn(x), 3, axis=-1))
        return self.c_proj(attend(q, k, v, self.scale))


class GPT2MLP(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.c_fc = Linear(shape.dims, shape.hidden_dims)
        self.c_proj = Linear(shape.hidden_dims, shape.dims)

    def __call__(self, x: mx.array) -> mx.array:
        return self.c_proj(gelu(self.c_fc(x)))


class GPT2Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.attn = GPT2Attention(shape)
        self.mlp = GPT2MLP(shape)
        self.ln_1 = LayerNorm(shape.dims, eps=shape.norm_eps)
        self.ln_2 = LayerNorm(shape.dims, eps=shape.norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        h = x + self.attn(self.ln_1(x))
        return h + self.mlp(self.ln_2(h))


class GPT2Body(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.dims)
        self.wpe = nn.Embedding(shape.context_length, shape.dims)
        self.h = [GPT2Block(shape) for _ in range(shape.num_layers)]
        self.ln_f = LayerNorm(shape.dims, eps=shape.norm_eps)

    def __call__(self, tokens: mx.array, run_layer) -> mx.array:
        h = self.wte(tokens) + self.wpe(mx.arange(tokens.shape[1]))
        h = h.astype(self.h[0].attn.c_attn.weight.dtype)
        for layer in self.h:
            h = run_layer(layer, h)
        return self.ln_f(h)


BODIES = {"llama": LlamaBody, "gpt2": GPT2Body}


class Transformer(nn.Module):
    """tokens int [B, L] -> hidden states [B, L, dims], in the dtype of its matrices (`for_products`)."""

    def __init__(self, shape: Shape, checkpoint_layers: bool = False):
        super().__init__()
        self.shape = shape
        self.model = BODIES[shape.family](shape)
        if not shape.tied:
            self.lm_head = nn.Linear(shape.dims, shape.vocab_size, bias=False)
        self._run_layer = run_checkpointed if checkpoint_layers else run_plain

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.model(tokens, self._run_layer)

    @property
    def head(self) -> mx.array:
        """The output matrix [vocab_size, dims]; that of a tied model is the embeddings', in fp32 (`for_products`)."""
        if not self.shape.tied:
            return self.lm_head.weight
        return (self.model.embed_tokens if self.shape.family == "llama" else self.model.wte).weight

    def logits(self, tokens: mx.array) -> mx.array:
        """All logits [B, L, vocab_size]: for small inputs and tests."""
        hidden = self(tokens)
        return hidden @ self.head.astype(hidden.dtype).T


LOOKED_UP = ("embed_tokens.weight", "wte.weight", "wpe.weight")


def for_products(parameters: dict, dtype: mx.Dtype) -> dict:
    """Parameters of a transformer that computes in `dtype`: its matrices are cast, what is looked up or added is not.

    Autodiff adds up the gradients of embeddings, positions, biases and norms over all tokens in their own dtype; in
    bf16 a sum of a few hundred numbers stands still (docs/gpu.md).
    """
    cast = lambda name, p: p if p.ndim == 1 or name.endswith(LOOKED_UP) else p.astype(dtype)  # noqa: E731
    return tree_map_with_path(cast, parameters)


def split_heads(x: mx.array, num_heads: int) -> mx.array:
    """[B, L, num_heads * head_dims] -> [B, num_heads, L, head_dims]."""
    B, L, _ = x.shape
    return x.reshape(B, L, num_heads, -1).transpose(0, 2, 1, 3)


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention, heads joined again: [B, L, num_heads * head_dims]."""
    B, _, L, _ = q.shape
    out = causal_attention(q, k, v, scale)
    return out.transpose(0, 2, 1, 3).reshape(B, L, -1)


def run_plain(layer: nn.Module, x: mx.array) -> mx.array:
    return layer(x)


def run_checkpointed(layer: nn.Module, x: mx.array) -> mx.array:
    """Keep only the layer's input; the backward pass computes the rest again."""

    def inner(parameters, x):
        layer.update(parameters)
        return layer(x)

    return mx.checkpoint(inner)(layer.trainable_parameters(), x)


def parameter_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shapes of a transformer's parameters by their flat names."""
    return {name: value.shape for name, value in tree_flatten(Transformer(shape).parameters())}


def initialise(shape: Shape, seed: int) -> dict:
    """Fresh fp32 parameters as a nested dict, GPT's way: N(0, 0.02), the two projections into the residual stream
    divided by sqrt(2 * num_layers), biases 0, norms 1. For a seed the same random bits on every backend; the normal
    numbers made of them differ in their last digits."""
    scales = {"c_proj", "o_proj", "down_proj"}
    key = mx.random.key(seed)
    found = []
    for name, value in sorted(tree_flatten(Transformer(shape).parameters())):
        module, kind = name.split(".")[-2:]
        if kind == "bias":
            made = mx.zeros(value.shape)
        elif "norm" in module or module.startswith("ln_"):
            made = mx.ones(value.shape)
        else:
            key, use = mx.random.split(key)
            scale = 0.02 / ((2 * shape.num_layers) ** 0.5 if module in scales else 1.0)
            made = mx.random.normal(value.shape, scale=scale, key=use)
        found.append((name, made))
    return tree_unflatten(found)

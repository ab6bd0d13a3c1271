"""What the families are built from: linear layers, norms, causal attention."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_slm.models.ops import added, causal_attention, scaled


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


def split_heads(x: mx.array, num_heads: int) -> mx.array:
    """[B, L, num_heads * head_dims] -> [B, num_heads, L, head_dims]."""
    B, L, _ = x.shape
    return x.reshape(B, L, num_heads, -1).transpose(0, 2, 1, 3)


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention, heads joined again: [B, L, num_heads * head_dims]."""
    B, _, L, _ = q.shape
    out = causal_attention(q, k, v, scale)
    return out.transpose(0, 2, 1, 3).reshape(B, L, -1)

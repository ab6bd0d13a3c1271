"""Cross-entropy of a tied head, in chunks: the logits of a whole batch never exist at once.

`linear_cross_entropy` is for training: it makes the gradients of hidden states and head in the forward pass, so that
each logit costs one exp instead of two. `token_nll` is for evaluation and does no gradient work.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_slm.machine import runtime, sums
from mlx_slm.models.ops import custom_function, exp_shifted
from mlx_slm.models.transformer import Transformer

CHUNK_LOGITS, CHUNK_ROWS, CHUNK_ROWS_ON_GPU = 2 << 20, 256, 2048
"""The logits of a chunk are 8 MB in fp32, or these rows if that is more: each chunk adds to the gradient of the whole
head, which with fewer rows costs more than the logits (docs/decisions.md)."""


def chunk_rows(rows: int, vocab_size: int) -> int:
    """Rows per chunk: chunks of equal size, as few as fit `CHUNK_LOGITS` or the rows of this device."""
    most = max(CHUNK_ROWS_ON_GPU if runtime.on_gpu() else CHUNK_ROWS, CHUNK_LOGITS // vocab_size)
    chunks = max(1, -(-rows // most))
    return -(-rows // chunks)


def linear_cross_entropy(
    hidden: mx.array, head: mx.array, targets: mx.array, weights: mx.array, rows: int | None = None
) -> mx.array:
    """Sum over positions of weights * cross-entropy(softmax(hidden @ head.T), targets), fp32 scalar.

    hidden [N, D], head [V, D], targets int [N], weights fp32 [N] (0 leaves a position out). `rows`: chunk size.
    Differentiable with respect to hidden and head; the gradients are those of the sum. Products are in the dtype of
    hidden; the head, and so its gradient, may be fp32 where that is bf16.
    """
    return chunked_loss(_chunk, hidden, head, (targets, weights), (), rows or chunk_rows(len(targets), len(head)))


def next_token_loss(model: Transformer, tokens: mx.array, weights: mx.array) -> mx.array:
    """Sum of the weighted losses of a model on tokens int [B, T+1] with target weights fp32 [B, T], fp32 scalar."""
    hidden = model(tokens[:, :-1])
    flat = hidden.reshape(-1, hidden.shape[-1])
    return linear_cross_entropy(flat, model.head, tokens[:, 1:].reshape(-1), weights.reshape(-1))


def chunked_loss(chunk: Callable, hidden: mx.array, head: mx.array, sliced: tuple, fixed: tuple, rows: int) -> mx.array:
    """The sum of a loss over positions, fp32 scalar, in chunks of `rows`; backward only scales the gradients.

    `chunk(h, head, *parts, *fixed)` gives (loss, its gradients with respect to h and, fp32, to head) of some positions:
    h of hidden [N, D], parts of `sliced` (arrays of N rows). Head and `fixed` are whole.
    """

    @custom_function
    def run(hidden, head, *others):
        head, fixed = head.astype(hidden.dtype), others[len(sliced) :]
        loss, d_head = mx.zeros((), mx.float32), None
        d_hidden: list[mx.array] = []
        for start in range(0, len(hidden), rows):
            h, *parts = (each[start : start + rows] for each in (hidden, *others[: len(sliced)]))
            if d_head is not None:  # without this the scheduler keeps the logits of all chunks
                h, *parts = mx.depends([h, *parts], [d_head, d_hidden[-1], loss])
            value, dh, dw = chunk(h, head, *parts, *fixed)
            loss = loss + value
            d_head = dw if d_head is None else d_head + dw
            d_hidden.append(dh.astype(hidden.dtype))
        return loss, mx.concatenate(d_hidden), d_head

    @run.vjp
    def backward(primals, cotangents, outputs):
        hidden, head, *others = primals
        scale = cotangents[0]
        gradients = (outputs[1] * scale).astype(hidden.dtype), (outputs[2] * scale).astype(head.dtype)
        return *gradients, *map(mx.zeros_like, others)

    return run(hidden, head, *sliced, *fixed)[0]


def _chunk(h: mx.array, head: mx.array, t: mx.array, w: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    (e, total), log_total, chosen = _exp_logits(h, head, t)
    # d logits = (w / total) (e - total onehot(target)): the first factor goes to the small side of products.
    # What is nearly equal is subtracted before anything is rounded to their dtype.
    d_logits = e.at[t, mx.arange(len(t))].add(-total).astype(h.dtype)
    share = (w / total)[:, None]
    d_head = (d_logits @ (h * share).astype(h.dtype)).astype(mx.float32)
    d_hidden = (d_logits.T @ head).astype(mx.float32) * share
    return sums.dot(log_total - chosen, w), d_hidden, d_head


def token_nll(hidden: mx.array, head: mx.array, targets: mx.array, rows: int | None = None) -> mx.array:
    """Negative log-likelihood in nats of each target, fp32 [N], to 2e-6; forward only. Shapes as above."""
    rows = rows or chunk_rows(len(targets), len(head))
    head, losses = head.astype(hidden.dtype), list[mx.array]()
    for start in range(0, len(targets), rows):
        h, t = hidden[start : start + rows], targets[start : start + rows]
        if losses:
            (h,) = mx.depends([h], [losses[-1]])
        _, log_total, chosen = _exp_logits(h, head, t)
        losses.append(log_total - chosen)
    return mx.concatenate(losses)


def _exp_logits(h: mx.array, head: mx.array, t: mx.array) -> tuple[tuple[mx.array, mx.array], mx.array, mx.array]:
    """Return ((e, total), log sum exp of the logits, logit of the target): e = exp(logits - their maximum), fp32 [V, n]
    with the vocabulary first, where reductions are vectorised; total = sum of e over it."""
    logits = (head @ h.T).astype(mx.float32)
    chosen = mx.take_along_axis(logits, t[None], axis=0)[0]
    e, top = exp_shifted(logits)
    total = sums.summed(e)
    return (e, total), mx.log(total) + top[0], chosen

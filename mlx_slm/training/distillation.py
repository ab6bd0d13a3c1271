"""The loss of a student that learns from a domain's tokens and from a teacher's distributions (SLM-d, section 2.2).

    a * cross-entropy + (1 - a) * tau^2 * KL(teacher at tau || student at tau),   softmax at tau: softmax(logits / tau)

In chunks, like the cross-entropy: the logits of neither model exist at once, and the gradients of the student's hidden
states and head are made in the forward pass. The factor tau^2 keeps the gradients of both terms alike in size.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_slm.machine import runtime, sums
from mlx_slm.models.ops import exp_nonpositive
from mlx_slm.models.transformer import Transformer, for_products
from mlx_slm.training.loss import chunk_rows, chunked_loss


class Distillation:
    """The loss of a model that learns from `teacher`: a callable (model, tokens, weights), as a training step takes.

    Output matrices may be padded beyond the tokens, as many are: of the teacher's the rows count that the student has
    too, and what the teacher has no row for it never expects.
    """

    def __init__(self, teacher: Transformer, a: float, tau: float):
        self.teacher, self.a, self.tau = teacher, a, tau
        teacher.update(for_products(teacher.parameters(), runtime.compute_dtype()))
        mx.eval(teacher.parameters())

    def __call__(self, model: Transformer, tokens: mx.array, weights: mx.array) -> mx.array:
        """tokens int [B, T+1], weights fp32 [B, T] of the targets; fp32 scalar, the weighted sum."""
        hidden, theirs = (one(tokens[:, :-1]) for one in (model, self.teacher))
        return linear_distillation(
            Head(hidden.reshape(-1, hidden.shape[-1]), model.head),
            Head(mx.stop_gradient(theirs.reshape(-1, theirs.shape[-1])), self.teacher.head[: len(model.head)]),
            (tokens[:, 1:].reshape(-1), weights.reshape(-1)),
            self.a,
            self.tau,
        )


class Head(NamedTuple):
    """What gives logits: hidden states [N, dims] and an output matrix [V, dims]."""

    hidden: mx.array
    matrix: mx.array


def linear_distillation(
    student: Head, teacher: Head, wanted: tuple[mx.array, mx.array], a: float, tau: float, rows: int | None = None
) -> mx.array:
    """Sum over positions of weights * (a * cross-entropy + (1 - a) * tau^2 * KL(teacher || student)), fp32 scalar.

    `wanted`: targets int [N] and weights fp32 [N]. `rows`: chunk size. Differentiable with respect to the student.
    """

    def chunk(h, head, ht, t, w, teacher_head):
        ours = (head @ h.T).astype(mx.float32)
        theirs = (teacher_head @ ht.T).astype(mx.float32)
        value, d_logits = _of_logits(ours, theirs, (t, w), a, tau)
        d_logits = d_logits.astype(head.dtype)
        return value, d_logits.T @ head, (d_logits @ h).astype(mx.float32)

    rows = rows or chunk_rows(len(student.hidden), 2 * len(student.matrix))
    fixed = (teacher.matrix.astype(teacher.hidden.dtype),)
    return chunked_loss(chunk, *student, (teacher.hidden, *wanted), fixed, rows)


def _of_logits(
    logits: mx.array, theirs: mx.array, wanted: tuple[mx.array, mx.array], a: float, tau: float
) -> tuple[mx.array, mx.array]:
    """(loss, its gradient with respect to the student's logits), of logits fp32 [V, n] and theirs [V or fewer, n]."""
    t, w = wanted
    chosen = mx.take_along_axis(logits, t[None], axis=0)[0]
    top = logits.max(axis=0)
    e = exp_nonpositive(logits - top)
    total = sums.summed(e)
    soft = e if tau == 1 else exp_nonpositive((logits - top) * (1 / tau))
    soft_total = total if tau == 1 else sums.summed(soft)
    their_top = theirs.max(axis=0)
    et = exp_nonpositive((theirs - their_top) * (1 / tau))
    their_total = sums.summed(et)
    missing = len(logits) - len(theirs)
    both = logits[: len(theirs)] if missing else logits
    apart = sums.summed(et * ((theirs - their_top) - (both - top))) / (tau * their_total)
    kl = apart - mx.log(their_total) + mx.log(soft_total)
    loss = a * (mx.log(total) + top - chosen) + (1 - a) * tau**2 * kl
    of_soft = (1 - a) * tau * w
    if missing:
        et = mx.pad(et, [(0, missing), (0, 0)])
    gradient = e * (a * w / total) + soft * (of_soft / soft_total) - et * (of_soft / their_total)
    return sums.dot(loss, w), gradient.at[t, mx.arange(len(t))].add(-a * w)

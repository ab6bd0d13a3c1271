"""The loss of a student that learns from a domain's tokens and from a teacher's distributions (SLM-d, section 2.2).

    a * cross-entropy + (1 - a) * tau^2 * KL(teacher at tau || student at tau),   softmax at tau: softmax(logits / tau)

In chunks, like the cross-entropy: the logits of neither model exist at once, and the gradients of the student's hidden
states and head are made in the forward pass. The factor tau^2 keeps the gradients of both terms alike in size.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_slm.machine import runtime, sums
from mlx_slm.models.ops import exp_nonpositive
from mlx_slm.models.transformer import Transformer, for_products
from mlx_slm.training.loss import chunk_rows


class Distillation:
    """The loss of a model that learns from `teacher`: a callable (model, tokens, weights), as a training step takes."""

    def __init__(self, teacher: Transformer, a: float, tau: float):
        self.teacher, self.a, self.tau = teacher, a, tau
        teacher.update(for_products(teacher.parameters(), runtime.compute_dtype()))
        mx.eval(teacher.parameters())

    def __call__(self, model: Transformer, tokens: mx.array, weights: mx.array) -> mx.array:
        """tokens int [B, T+1], weights fp32 [B, T] of the targets; fp32 scalar, the weighted sum."""
        hidden, theirs = (one(tokens[:, :-1]) for one in (model, self.teacher))
        return linear_distillation(
            hidden.reshape(-1, hidden.shape[-1]),
            model.head,
            mx.stop_gradient(theirs.reshape(-1, theirs.shape[-1])),
            self.teacher.head,
            tokens[:, 1:].reshape(-1),
            weights.reshape(-1),
            self.a,
            self.tau,
        )


def linear_distillation(
    hidden: mx.array,
    head: mx.array,
    teacher_hidden: mx.array,
    teacher_head: mx.array,
    targets: mx.array,
    weights: mx.array,
    a: float,
    tau: float,
    rows: int | None = None,
) -> mx.array:
    """Sum over positions of weights * (a * cross-entropy + (1 - a) * tau^2 * KL(teacher || student)), fp32 scalar.

    hidden [N, D], head [V, D], of the teacher [N, E] and [V, E], targets int [N], weights fp32 [N]. `rows`: chunk size.
    Differentiable with respect to hidden and head.
    """

    @mx.custom_function
    def run(hidden, head, teacher_hidden, teacher_head, targets, weights):
        head, teacher_head = head.astype(hidden.dtype), teacher_head.astype(teacher_hidden.dtype)
        loss, d_head, d_hidden = mx.zeros((), mx.float32), None, []
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            h, ht, t, w = hidden[part], teacher_hidden[part], targets[part], weights[part]
            if d_hidden:  # without this the scheduler keeps the logits of all chunks
                h, ht = mx.depends([h, ht], [d_head, d_hidden[-1], loss])
            value, d_logits = _chunk(head, h, teacher_head, ht, t, w, a, tau)
            loss = loss + value
            d_logits = d_logits.astype(head.dtype)
            dw = (d_logits @ h).astype(mx.float32)
            d_head = dw if d_head is None else d_head + dw
            d_hidden.append((d_logits.T @ head).astype(hidden.dtype))
        return loss, mx.concatenate(d_hidden), d_head

    @run.vjp
    def backward(primals, cotangents, outputs):
        hidden, head, *others = primals
        scale = cotangents[0]
        return (
            (outputs[1] * scale).astype(hidden.dtype),
            (outputs[2] * scale).astype(head.dtype),
            *map(mx.zeros_like, others),
        )

    step = rows or chunk_rows(len(targets), 2 * len(head))
    return run(hidden, head, teacher_hidden, teacher_head, targets, weights)[0]


def _chunk(head, h, teacher_head, ht, t, w, a: float, tau: float) -> tuple[mx.array, mx.array]:
    """(loss of the chunk, its gradient with respect to the student's logits, fp32 [V, n])."""
    logits = (head @ h.T).astype(mx.float32)
    chosen = mx.take_along_axis(logits, t[None], axis=0)[0]
    top = logits.max(axis=0)
    e = exp_nonpositive(logits - top)
    total = sums.summed(e)
    soft = e if tau == 1 else exp_nonpositive((logits - top) * (1 / tau))
    soft_total = total if tau == 1 else sums.summed(soft)
    theirs = (teacher_head @ ht.T).astype(mx.float32)
    their_top = theirs.max(axis=0)
    et = exp_nonpositive((theirs - their_top) * (1 / tau))
    their_total = sums.summed(et)
    apart = sums.summed(et * ((theirs - their_top) - (logits - top))) / (tau * their_total)
    kl = apart - mx.log(their_total) + mx.log(soft_total)
    loss = a * (mx.log(total) + top - chosen) + (1 - a) * tau**2 * kl
    of_soft = (1 - a) * tau * w
    gradient = e * (a * w / total) + soft * (of_soft / soft_total) - et * (of_soft / their_total)
    return sums.dot(loss, w), gradient.at[t, mx.arange(len(t))].add(-a * w)

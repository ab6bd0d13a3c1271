"""AdamW on fp32 masters, the schedule, the exact global norm, and the guard against non-finite steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_map

from mlx_slm.config.schema import TrainingConfig
from mlx_slm.machine import sums
from mlx_slm.machine.trees import flat

OPTIMIZER_FIELDS = ("betas", "eps", "weight_decay", "clip_norm")
"""The fields of the section `training` that specialisation takes over."""


@dataclass(frozen=True)
class AdamW:
    """Adam with bias correction and decoupled decay on matrices only (paper: Adam, no decay, clip norm 5.0)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 5.0
    sent_as: str = "float32"
    """The dtype in which ranks send their gradients."""

    @classmethod
    def of(cls, training: TrainingConfig) -> AdamW:
        settings = {name: getattr(training, name) for name in OPTIMIZER_FIELDS}
        return cls(**settings, sent_as=training.gradient_dtype)

    @property
    def wire(self) -> mx.Dtype:
        """The dtype in which ranks send their gradients."""
        return getattr(mx, self.sent_as)

    def init(self, parameters: dict) -> dict:
        """`{"m", "v", "updates", "bad"}`: moments like the parameters, updates made, non-finite steps in a row."""
        return {
            "m": tree_map(mx.zeros_like, parameters),
            "v": tree_map(mx.zeros_like, parameters),
            "updates": mx.array(0, mx.int32),
            "bad": mx.array(0, mx.int32),
        }

    def update(self, parameters: dict, state: dict, gradients: dict, total: mx.array, loss: mx.array, rate: mx.array):
        """One step on gradients of a loss summed over `total` target tokens.

        Returns (parameters, state, norm): the norm is that of the mean gradient before clipping. A loss or a norm that
        is not finite leaves parameters and moments as they are and adds one to `bad`.
        """
        norm = global_norm(gradients) / total
        now = self.now(state, norm, total, loss, rate)
        p, m, v = self.moved_tree(parameters, state["m"], state["v"], gradients, now)
        return p, {"m": m, "v": v, "updates": now["updates"], "bad": now["bad"]}, norm

    def now(self, state: dict, norm: mx.array, total: mx.array, loss: mx.array, rate: mx.array) -> dict:
        """The numbers of this step that every tensor's update needs: those of a step that moves nothing if not `good`.

        Each is an array of its own (`mx.contiguous`): fused into the loop over a tensor, they would be computed again
        for every element.
        """
        good = mx.isfinite(norm) & mx.isfinite(loss)
        updates = state["updates"] + good.astype(mx.int32)
        t = mx.maximum(updates, 1).astype(mx.float32)
        b1, b2 = self.betas
        numbers = {
            "good": good,
            "scale": mx.minimum(1.0, self.clip_norm / mx.maximum(norm, 1e-30)) / total,
            "keep_m": mx.where(good, b1, 1.0),
            "take_m": mx.where(good, 1 - b1, 0.0),
            "keep_v": mx.where(good, b2, 1.0),
            "take_v": mx.where(good, 1 - b2, 0.0),
            "decay": mx.where(good, self.weight_decay * rate, 0.0),
            "step_size": mx.where(good, rate / (1 - b1**t), 0.0),
            "root": mx.sqrt(1 - b2**t),
            "updates": updates,
            "bad": mx.where(good, 0, state["bad"] + 1),
        }
        return {name: mx.contiguous(number) for name, number in numbers.items()}

    def moved_tree(self, parameters: dict, m: dict, v: dict, gradients: dict, now: dict) -> tuple[dict, dict, dict]:
        """`moved` for every tensor of a tree: (parameters, m, v)."""
        moved = tree_map(lambda p, m, v, g: self.moved(p, m, v, g, now), parameters, m, v, gradients)
        is_leaf = lambda x: isinstance(x, tuple)  # noqa: E731
        p, m, v = (tree_map(lambda x, i=i: x[i], moved, is_leaf=is_leaf) for i in range(3))
        return p, m, v

    def moved(self, p: mx.array, m: mx.array, v: mx.array, g: mx.array, now: dict, factor: float = 1.0) -> tuple:
        """(parameter, moments) of one tensor after its step, at `factor` times the rate; as they were if not `good`."""
        g = mx.where(now["good"], g * now["scale"], 0.0)
        m = now["keep_m"] * m + now["take_m"] * g
        v = now["keep_v"] * v + now["take_v"] * mx.square(g)
        decayed = p - now["decay"] * factor * p if self.weight_decay and p.ndim > 1 else p
        return decayed - now["step_size"] * factor * m / (mx.sqrt(v) / now["root"] + self.eps), m, v


def global_norm(tree: dict) -> mx.array:
    """L2 norm over all tensors, the same to the bit whatever their order in the tree; exact to 1e-5 (`sums`)."""
    return mx.sqrt(sums.sum_of_squares(g for _, g in sorted(flat(tree).items(), key=lambda item: item[0])))


def learning_rate(step: int, base: float, warmup: int, schedule: str, steps: int) -> float:
    """The rate of a step (from 0): linear warm-up that does not begin at 0, then constant or cosine to a tenth."""
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "constant":
        return base
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return base * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

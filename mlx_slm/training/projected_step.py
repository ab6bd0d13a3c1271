"""One training step of a projected network: groups of rows, each through its cluster's expert, in one compiled graph.

Per projected matrix, C = e M gives stacked weights W = C T [groups, out, in]; the gradient with respect to them,
dW, is all that the backward pass makes. The rest follows by the chain rule, one matrix at a time:

    dT = C^T dW      |dT|^2 = sum((C C^T) * (dW dW^T))      dC = dW T^T      dM = e^T dC      dE[ids] += shares dC M^T

with e = sum_j shares[:, j] E[ids[:, j]], the expert's vector of each group: E[ids] where a group has one expert.

dT of all matrices would double the memory of the network; of one matrix at a time (a lane) it does not.

Of several ranks each has some of the groups. They gather dW, and each works out the rest, while a step has at most h
groups; beyond that dT of all matrices is less to send: it is summed, one matrix after the other.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_slm.config.schema import ProjectionConfig, TrainingConfig
from mlx_slm.machine import runtime, sums
from mlx_slm.machine.ranks import Ranks, ranks
from mlx_slm.machine.trees import flat, nested
from mlx_slm.models.projected import ProjectedShape, coefficients, combined, network_of
from mlx_slm.models.transformer import Transformer, for_products
from mlx_slm.text.rows import Soup
from mlx_slm.training.loss import next_token_loss
from mlx_slm.training.optimizer import AdamW, global_norm
from mlx_slm.training.step import add_trees, compiled_lanes, largest_that_fits, shared_out, training_bytes

PROJECTING = 0.1


class ProjectedStep:
    """Moves `parameters` ({"shared", "E", "M", "T"}, fp32) and `moments` by one batch at a time.

    A micro-batch is `micro_groups` groups. T learns at `tensor_rate` times the rate: Adam moves W_i by about
    rate * sum_r |c_ir| a step.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: AdamW,
        micro_groups: int,
        parameters: dict,
        moments: dict | None = None,
        tensor_rate: float = 1.0,
    ):
        self.model, self.micro_groups, self.optimizer, self.tensor_rate = model, micro_groups, optimizer, tensor_rate
        self.parameters = network_of(parameters)
        moments = moments or optimizer.init(self.parameters)
        self.moments = moments | {part: network_of(moments[part]) for part in "mv"}
        self.dtype = runtime.compute_dtype()
        self._lanes = compiled_lanes(self._loss_and_gradients, micro_groups)
        self._chain = mx.compile(self._chain_rule)
        self._small = mx.compile(self._update_small)
        self._tensor_lanes = compiled_lanes(self._update_tensor, len(self.parameters["T"]))

    def __call__(
        self, tokens: np.ndarray, weights: np.ndarray, rate: float, experts: np.ndarray | Soup
    ) -> tuple[mx.array, mx.array, mx.array]:
        """One step on tokens int [B, T+1] with target weights fp32 [B, T]; `experts`: the cluster of each group, int
        [groups], or the clusters that it combines; rows in their order.

        Returns (sum of losses, norm of the mean gradient, non-finite steps in a row).
        """
        soup = experts if isinstance(experts, Soup) else Soup(experts[:, None], np.ones((len(experts), 1), np.float32))
        together, every = ranks(), np.arange(len(soup.clusters))
        E, M, T = (self.parameters[part] for part in "EMT")
        total, rows = mx.array(float(weights.sum())), len(tokens) // len(every)
        own = together.own(every)
        gathers = together.size > 1 and len(every) <= len(next(iter(T.values())))
        known = together.by_rank(every) if gathers else own
        offset, groups = together.rank * len(own) if gathers else 0, len(own)
        places = (own[:, None] * rows + np.arange(rows)).reshape(-1)
        tokens, weights = tokens[places], weights[places]
        mixed = mx.array(soup.clusters[known]), mx.array(soup.shares[known])
        C = coefficients(self.parameters, vectors(E, *mixed))
        loss: Any = None
        shared: Any = None
        stacks: dict[str, list[mx.array]] = {name: [] for name in T}
        for start in range(0, groups, self.micro_groups):
            chosen = np.arange(start, min(start + self.micro_groups, groups))
            for part, stream, gradients_of in shared_out(chosen, self._lanes):
                where = slice(offset + part[0], offset + part[-1] + 1)
                batch = slice(part[0] * rows, (part[-1] + 1) * rows)
                theirs = {name: c[where] for name, c in C.items()}
                with mx.stream(stream):
                    one, d_shared, dW = gradients_of(
                        self.parameters["shared"], T, theirs, mx.array(tokens[batch]), mx.array(weights[batch])
                    )
                loss, shared = (one, d_shared) if loss is None else (loss + one, add_trees(shared, d_shared))
                for name, value in dW.items():
                    stacks[name].append(value)
            if self.micro_groups < groups:
                mx.async_eval(loss, shared, stacks)
        dW = {name: mx.concatenate(parts) for name, parts in stacks.items()}
        loss, shared = together.summed(loss), together.summed_tree(shared, self.optimizer.wire)
        if gathers:
            dW = {
                name: together.gathered(stack.astype(self.optimizer.wire)).astype(mx.float32)
                for name, stack in dW.items()
            }
        dE, dM, norm = self._chain({"E": E, "M": M, "T": T}, C, dW, mixed, shared)
        dT: dict[str, mx.array] = {}
        if together.size > 1 and not gathers:
            dT, dE, dM, norm = self._sent_tensors(together, C, dW, {"shared": shared, "E": dE, "M": dM})
        gradients = {"shared": shared, "E": dE, "M": dM}
        mx.async_eval(dW, dE, dM, shared, norm, loss)
        small, moments, norm, now = self._small(
            self._without_tensors(self.parameters),
            self._small_moments(),
            gradients,
            norm,
            (total, loss, mx.array(rate)),
        )
        mx.async_eval(small, moments, now)
        m, v = (self.moments[part]["T"] for part in "mv")
        names = list(T)
        before: list[tuple] = []
        for first in range(0, len(names), len(self._tensor_lanes)):
            at_once = names[first : first + len(self._tensor_lanes)]
            for name, (stream, moved) in zip(at_once, self._tensor_lanes, strict=False):
                with mx.stream(stream):
                    gradient = (dT.pop(name),) if dT else (C[name], dW.pop(name))
                    T[name], m[name], v[name] = moved(T[name], m[name], v[name], now, *gradient)
            moved_now = [(T[name], m[name], v[name]) for name in at_once]
            mx.async_eval(moved_now)
            # A whole update at once would hold the gradient of all T; a GPU has the next matrix at hand meanwhile.
            mx.eval(before if runtime.on_gpu() else moved_now)
            before = moved_now
        self.parameters = small | {"T": T}
        self.moments = {
            "m": moments["m"] | {"T": m},
            "v": moments["v"] | {"T": v},
            "updates": now["updates"],
            "bad": now["bad"],
        }
        return loss, norm, now["bad"]

    def sharing_cores(self) -> AbstractContextManager:
        """Enter this around a run of steps."""
        return runtime.sharing_cores(len(self._lanes))

    @staticmethod
    def _without_tensors(tree: dict) -> dict:
        return {part: tree[part] for part in ("shared", "E", "M")}

    def _small_moments(self) -> dict:
        return self.moments | {part: self._without_tensors(self.moments[part]) for part in "mv"}

    def _loss_and_gradients(self, shared: dict, T: dict, C: dict, tokens: mx.array, weights: mx.array):
        def loss(shared, stacks):
            parameters = nested(flat(shared) | stacks)
            self.model.update(for_products(parameters, self.dtype))
            return next_token_loss(self.model, tokens, weights)

        stacks = {name: combined(T[name], c) for name, c in C.items()}
        value, (d_shared, d_stacks) = mx.value_and_grad(loss, argnums=(0, 1))(shared, stacks)
        return value, d_shared, d_stacks

    @staticmethod
    def _chain_rule(parameters, C, dW, mixed, shared):
        """(dE, dM, global norm of all gradients, those of T from Gram matrices)."""
        E, M, T = (parameters[part] for part in "EMT")
        ids, shares = mixed
        rows, dM, squares = vectors(E, ids, shares), {}, []
        dE_rows: Any = 0.0
        for name in sorted(T):
            flat = dW[name].reshape(len(rows), -1)
            dC = flat @ T[name].reshape(len(T[name]), -1).T
            dM[name] = rows.T @ dC
            dE_rows = dE_rows + dC @ M[name].T
            squares.append(sums.dot(C[name] @ C[name].T, _gram(dW[name])))
        dE = mx.zeros_like(E).at[ids].add(shares[..., None] * dE_rows[:, None])
        small = global_norm({"shared": shared, "E": dE, "M": dM})
        return dE, dM, mx.sqrt(mx.square(small) + sums.summed(mx.stack(squares)))

    def _update_small(self, parameters, moments, gradients, norm, batch):
        total, loss, rate = batch
        norm = norm / total
        now = self.optimizer.now(moments, norm, total, loss, rate)
        p, m, v = self.optimizer.moved_tree(parameters, moments["m"], moments["v"], gradients, now)
        return p, {"m": m, "v": v}, norm, now

    def _update_tensor(self, T, m, v, now, *gradient):
        """`gradient`: dT, or the C and dW that it follows from."""
        dT = gradient[0] if len(gradient) == 1 else tensor_gradient(*gradient)
        return self.optimizer.moved(T, m, v, dT, now, self.tensor_rate)

    def _sent_tensors(self, together: Ranks, C: dict, dW: dict, small: dict) -> tuple[dict, dict, dict, mx.array]:
        """(dT, dE, dM, global norm) of all ranks' groups, from those of this one; dW is used up."""
        few = together.summed_tree({part: small[part] for part in "EM"})
        dT = {}
        for name in list(dW):
            own = tensor_gradient(C[name], dW.pop(name)).astype(self.optimizer.wire)
            dT[name] = together.summed(own).astype(mx.float32)
            mx.eval(dT[name])
        return dT, few["E"], few["M"], global_norm(small | few | {"T": dT})


def tensor_gradient(C: mx.array, dW: mx.array) -> mx.array:
    """dT [h, out, in] of coefficients [groups, h] and dW [groups, out, in]."""
    return (C.T @ dW.reshape(len(C), -1)).reshape(C.shape[1], *dW.shape[1:])


def vectors(E: mx.array, ids: mx.array, shares: mx.array) -> mx.array:
    """The vector [groups, m] of each group's expert, of E [k, m]: sum_j shares[g, j] E[ids[g, j]]."""
    return (shares[..., None] * E[ids]).sum(axis=1)


def _gram(stack: mx.array) -> mx.array:
    """Inner products of the matrices of a stack [groups, out, in] with each other, fp32 [groups, groups]."""
    rows = mx.contiguous(stack.swapaxes(0, 1))
    return sums.summed(rows @ rows.swapaxes(1, 2))


def network_bytes(shape: ProjectedShape, groups: int, rows: int, micro_groups: int, recompute_layers: bool) -> int:
    """Memory of a step of `groups` groups of `rows` rows, an estimate: the plain step's on a micro-batch, the network
    with its moments, the successors of one matrix and a copy of its groups, and each group's stacked weights and their
    gradients in fp32; where the compute dtype is another, those of a micro-batch in it as well."""
    dtype = runtime.compute_dtype()
    plain = training_bytes(shape.base, micro_groups * rows, recompute_layers)
    largest = shape.base.dims * shape.base.hidden_dims
    stacks = shape.projected_parameters * (2 * groups + 2 * micro_groups)
    cast = 0 if dtype == mx.float32 else 2 * dtype.size * micro_groups * shape.projected_parameters
    return plain + 4 * (3 * shape.num_parameters + (3 * shape.h + groups) * largest + stacks) + cast


def resolved(config: ProjectionConfig, training: TrainingConfig, shape: ProjectedShape) -> ProjectionConfig:
    """The section with its defaults written out: h, and the groups of rows in a step."""
    groups = config.clusters_per_step or _most_groups(training, shape)
    return config.model_copy(update={"h": shape.h, "clusters_per_step": groups})


def resolved_groups(config: ProjectionConfig) -> int:
    """Groups of rows in a step, of a section that is `resolved`."""
    assert config.clusters_per_step is not None
    return config.clusters_per_step


def _most_groups(training: TrainingConfig, shape: ProjectedShape) -> int:
    """The most groups of equal size that fit the memory, and for which projecting costs at most `PROJECTING` of an
    expert's FLOPs."""
    base, memory = shape.base, 0.8 * runtime.memory_bytes()
    for groups in range(training.batch_rows, 1, -1):
        rows, uneven = divmod(training.batch_rows, groups)
        uneven = uneven or (training.micro_rows or rows) % rows
        if uneven or network_bytes(shape, groups, rows, 1, False) > memory:
            continue
        if shape.flops_per_token(rows * base.context_length) <= (1 + PROJECTING) * base.flops_per_token:
            return groups
    return 1


def groups_that_fit(
    shape: ProjectedShape, groups: int, rows: int, given: int | None = None, recompute_layers: bool | None = None
) -> tuple[int, bool]:
    """(groups of a micro-batch, whether layers are computed again in the backward pass): see `largest_that_fits`."""
    advice = ", a smaller projection.h, or more projection.clusters_per_step with fewer rows each"
    bytes_of = lambda micro, recompute: network_bytes(shape, groups, rows, micro, recompute)  # noqa: E731
    return largest_that_fits(groups, bytes_of, given, recompute_layers, shape.num_parameters, advice)

"""One training step: forward, backward and update, compiled; the state it moves is `parameters` and `moments`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_slm.errors import SlmError
from mlx_slm.machine import runtime
from mlx_slm.machine.ranks import ranks
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, for_products, initialise
from mlx_slm.training.loss import chunk_rows, next_token_loss
from mlx_slm.training.optimizer import AdamW

Lane = tuple[mx.Stream, Callable]
add_trees = mx.compile(lambda a, b: tree_map(mx.add, a, b))


def compiled_lanes(function: Callable, parts: int) -> list[Lane]:
    """Each of the machine's streams with `function` compiled for it; one where there are fewer parts than streams."""
    streams = runtime.lanes() if parts >= len(runtime.lanes()) else runtime.lanes()[:1]
    return [(stream, mx.compile(function)) for stream in streams]


def shared_out(items: np.ndarray, lanes: list[Lane]) -> Iterator[tuple[np.ndarray, mx.Stream, Callable]]:
    """An even, consecutive part of the items for each lane that gets one."""
    for part, lane in zip(np.array_split(items, len(lanes)), lanes, strict=True):
        if len(part):
            yield part, *lane


def as_it_is(parameters: dict) -> dict:
    """What is trained is the model."""
    return parameters


@dataclass(frozen=True)
class Objective:
    """What is minimised, and of what."""

    loss: Callable[[Transformer, mx.array, mx.array], mx.array] = next_token_loss
    """(model, tokens, weights) -> a sum over target tokens."""
    plain: Callable[[dict], dict] = as_it_is
    """What is trained -> parameters of the model."""


class TrainingStep:
    """Moves `parameters` (fp32 masters) and `moments` by one batch at a time.

    What is minimised is the objective's loss as a mean over the target tokens of all micro-batches of `micro_rows`
    rows. Compute is in `runtime.compute_dtype()`.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: AdamW,
        micro_rows: int,
        parameters: dict,
        moments: dict | None = None,
        objective: Objective = Objective(),
    ):
        self.model, self.micro_rows, self.objective, self.optimizer = model, micro_rows, objective, optimizer
        self.parameters = parameters
        self.moments: dict = moments or optimizer.init(parameters)
        self.dtype = runtime.compute_dtype()
        self._lanes = compiled_lanes(self._loss_and_gradients, micro_rows)
        self._update = mx.compile(optimizer.update)

    def __call__(
        self, tokens: np.ndarray, weights: np.ndarray, rate: float, experts: Any = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Start a step on tokens int [B, T+1] with target weights fp32 [B, T]; does not wait for it.

        Of several ranks each takes its part of the rows, and all move alike. `experts` make no difference here. Returns
        (sum of losses, norm of the mean gradient, non-finite steps in a row) as arrays in flight.
        """
        total, now, together = mx.array(float(weights.sum())), mx.array(rate), ranks()
        tokens, weights = together.own(tokens), together.own(weights)
        loss: Any = None
        gradients: Any = None
        for start in range(0, len(tokens), self.micro_rows):
            rows = np.arange(start, min(start + self.micro_rows, len(tokens)))
            for part, stream, gradients_of in shared_out(rows, self._lanes):
                with mx.stream(stream):
                    both = gradients_of(self.parameters, mx.array(tokens[part]), mx.array(weights[part]))
                loss, gradients = both if loss is None else (loss + both[0], add_trees(gradients, both[1]))
            if self.micro_rows < len(tokens):
                mx.async_eval(loss, gradients)
        loss, gradients = together.summed(loss), together.summed_tree(gradients, self.optimizer.wire)
        self.parameters, self.moments, norm = self._update(self.parameters, self.moments, gradients, total, loss, now)
        mx.async_eval(self.parameters, self.moments, loss, norm)
        return loss, norm, self.moments["bad"]

    def restart(self, parameters: dict) -> None:
        """Go on from other parameters, with new moments."""
        self.parameters, self.moments = parameters, self.optimizer.init(parameters)

    def sharing_cores(self) -> AbstractContextManager:
        """Enter this around a run of steps."""
        return runtime.sharing_cores(len(self._lanes))

    def _loss_and_gradients(self, parameters: dict, tokens: mx.array, weights: mx.array) -> tuple[mx.array, dict]:
        def loss(parameters):
            self.model.update(for_products(self.objective.plain(parameters), self.dtype))
            return self.objective.loss(self.model, tokens, weights)

        return mx.value_and_grad(loss)(parameters)


def training_bytes(shape: Shape, rows: int, recompute_layers: bool = False) -> int:
    """Memory of a step on `rows` rows in the compute dtype: an estimate, 0.9 to 1.7 times what is measured on a CPU, in
    bf16 as well (with attention that keeps nothing, as the fused one does).

    Weights, two moments and their successors, gradients; where the dtype is not fp32, the matrices and their gradients
    in it; then per token and layer 11 dims, 4 inner dims and, where it is not fused, the attention's probabilities;
    then the chunks of the cross-entropy (of two lanes on a CPU).
    """
    dtype, on_gpu = runtime.compute_dtype(), runtime.on_gpu()
    scores = 0 if on_gpu else shape.num_heads * shape.context_length
    per_layer = 11 * shape.dims + 4 * shape.hidden_dims + scores
    layers = per_layer + shape.num_layers * shape.dims if recompute_layers else per_layer * shape.num_layers
    tokens = rows * shape.context_length
    logits = chunk_rows(tokens, shape.vocab_size) * shape.vocab_size
    head = (5 if on_gpu else 12) * logits + 6 * shape.vocab_size * shape.dims
    cast = 0 if dtype == mx.float32 else 2 * dtype.size * shape.num_parameters
    return 4 * (7 * shape.num_parameters + head) + cast + dtype.size * tokens * layers


def rows_that_fit(
    shape: Shape,
    batch_rows: int,
    given: int | None = None,
    recompute_layers: bool | None = None,
    extra_bytes: int = 0,
) -> tuple[int, bool]:
    """(rows of a micro-batch, whether layers are computed again in the backward pass): see `largest_that_fits`."""
    bytes_of = lambda rows, recompute: training_bytes(shape, rows, recompute) + extra_bytes  # noqa: E731
    return largest_that_fits(batch_rows, bytes_of, given, recompute_layers, shape.num_parameters)


def largest_that_fits(
    whole: int,
    bytes_of: Callable[[int, bool], int],
    given: int | None,
    recompute_layers: bool | None,
    parameters: int,
    advice: str = "",
) -> tuple[int, bool]:
    """(the largest divisor of `whole` with which `bytes_of` is at most 0.8 of the memory, whether to recompute).

    What is `given` is taken, whether it fits or not. Without a wish for `recompute_layers` the layers are computed
    again only where nothing fits otherwise. Raises SlmError if nothing is given and nothing fits.
    """
    memory, wishes = runtime.memory_bytes(), (False, True) if recompute_layers is None else (recompute_layers,)
    if given:
        return given, next((wish for wish in wishes if bytes_of(given, wish) <= 0.8 * memory), wishes[-1])
    for recompute in wishes:
        for part in range(whole, 0, -1):
            if whole % part == 0 and bytes_of(part, recompute) <= 0.8 * memory:
                return part, recompute
    if recompute_layers is False:
        advice += ", or leave training.recompute_layers out"
    raise SlmError(
        f"a step of this model ({parameters:,} parameters) needs about {bytes_of(1, wishes[-1]) / 2**30:.1f} GB at the "
        f"least, and {memory / 2**30:.1f} GB are there: choose a smaller model{advice}"
    )


def measure_speed(shape: Shape, rows: int, seconds: float, recompute_layers: bool = False) -> float:
    """Tokens per second of training steps on `rows` random rows: the median after the first, in about `seconds`."""
    runtime.configure_device()
    step = TrainingStep(Transformer(shape, recompute_layers), AdamW(), rows, initialise(shape, 0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.vocab_size, (rows, shape.context_length + 1), np.int32)
    weights = np.ones((rows, shape.context_length), np.float32)
    times: list[float] = []
    begun = time.perf_counter()
    with step.sharing_cores():
        while len(times) < 3 or time.perf_counter() - begun < seconds:
            start = time.perf_counter()
            mx.eval(step(tokens, weights, 1e-4), step.parameters)
            times.append(time.perf_counter() - start)
    runtime.release_cache()
    return weights.size / statistics.median(times[1:])

"""The loss of models on windows: every stored token scored exactly once, totals in float64.

Each window is read with one `</s>` before it and predicts all its tokens. The result does not depend on batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_slm.errors import SlmError
from mlx_slm.files import Damaged
from mlx_slm.machine import runtime
from mlx_slm.machine.ranks import ranks
from mlx_slm.models.transformer import Transformer
from mlx_slm.report import Report, perplexity
from mlx_slm.text.store import Store, first_windows, length_batches
from mlx_slm.training.loss import token_nll

LENGTHS = 8
"""Windows are padded to one of this many lengths, so that few graphs are compiled."""
BATCH_TOKENS = 4096
LEAST_TOKENS = 256
"""Of a validation set, where windows are longer."""


@dataclass(frozen=True)
class Score:
    """Totals over a set. Perplexity and bits are of tokens and of UTF-8 bytes of text."""

    tokens: int
    nll: float
    """Nats per token."""
    stderr: float
    """Standard error of `nll` over documents."""
    perplexity: float
    bits_per_byte: float
    documents: int

    @classmethod
    def of(cls, nll: np.ndarray, tokens: np.ndarray, documents: np.ndarray, num_bytes: int) -> Score:
        """From per-window sums: nll float64 [W], tokens int [W], document of each window [W]."""
        _, place = np.unique(documents, return_inverse=True)
        per_document = np.bincount(place, nll), np.bincount(place, tokens)
        count, total = len(per_document[0]), int(tokens.sum())
        mean = math.fsum(nll) / total
        spread = per_document[0] - mean * per_document[1]
        stderr = math.sqrt(float(spread @ spread) * count / max(1, count - 1)) / total
        return cls(total, mean, stderr, perplexity(mean), mean * total / max(1, num_bytes) / math.log(2), count)


class Scorer:
    """Scores windows of stores with the present weights of a model; graphs are compiled once per shape."""

    def __init__(self, model: Transformer):
        def nll(tokens: mx.array, targets: mx.array) -> mx.array:
            hidden = model(tokens)
            flat = hidden.reshape(-1, hidden.shape[-1])
            return token_nll(flat, model.head, targets.reshape(-1)).reshape(targets.shape)

        self.model = model
        self._lanes = [mx.compile(nll, inputs=[model.state]) for _ in runtime.lanes()]

    def __call__(
        self, store: Store, windows: np.ndarray, batch_rows: int | None = None, report: Report | None = None
    ) -> Score:
        """Score the given windows. `batch_rows`: rows at a time; by default so many that a batch has 4,096 tokens."""
        return score_of(store, windows, self.window_nll(store, windows, batch_rows, report))

    def window_nll(
        self, store: Store, windows: np.ndarray, batch_rows: int | None = None, report: Report | None = None
    ) -> np.ndarray:
        """Sum of the token losses of each window, float64 [W]."""
        result = np.zeros(len(windows))
        for members, nll, counted in self._batches(store, windows, batch_rows, report):
            result[members] = (nll * counted).sum(axis=1)
        return result

    def token_nll(self, store: Store, windows: np.ndarray) -> np.ndarray:
        """The loss of each token, float32 [tokens], window by window."""
        lengths = store.lengths(windows).astype(np.int64)
        ends = np.cumsum(lengths)
        result = np.zeros(int(lengths.sum()), np.float32)
        for members, nll, counted in self._batches(store, windows):
            for member, losses, counts in zip(members, nll, counted, strict=True):
                result[ends[member] - lengths[member] : ends[member]] = losses[counts]
        return result

    def _batches(
        self, store: Store, windows: np.ndarray, batch_rows: int | None = None, report: Report | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(places in `windows`, losses float64 [rows, length], bool: which of them are of stored tokens)."""
        lengths = store.lengths(windows)
        if not lengths.sum():
            raise SlmError(f"{store.directory} has no text to evaluate on")
        step = -(-store.context_length // LENGTHS)
        batches = length_batches(lengths, step, store.context_length, BATCH_TOKENS, batch_rows)

        def losses(lane: int, batch: tuple) -> mx.array:
            members, rows, length = batch
            targets = np.full((rows, length), store.eos_id, np.int32)
            for row, member in enumerate(members):
                targets[row, : lengths[member]] = store.window_tokens(windows[member])
            if targets.max() >= self.model.shape.vocab_size:  # a look-up there reads memory of somebody else
                raise Damaged(
                    f"{store.directory} holds the token {targets.max()}, the model's vocabulary has "
                    f"{self.model.shape.vocab_size}: prepare the text again, with the model's tokenizer"
                )
            tokens = np.full_like(targets, store.eos_id)
            tokens[:, 1:] = targets[:, :-1]
            return self._lanes[lane](mx.array(tokens), mx.array(targets))

        with (report or Report()).progress("evaluating", int(lengths.sum()), " tok") as advance:
            for (members, _, length), nll in runtime.in_lanes(batches, losses):
                counted = np.arange(length) < lengths[members][:, None]
                yield members, np.array(nll, np.float64)[: len(members)], counted
                advance(int(lengths[members].sum()))


def score_of(store: Store, windows: np.ndarray, nll: np.ndarray) -> Score:
    """The score of windows of a store from the loss of each, float64 [W]."""
    facts = store.windows[:][windows]
    return Score.of(nll, facts["length"], facts["document"], int(facts["bytes"].sum()))


def routed_nll(
    scorer: Scorer,
    expert: Callable[[int], dict],
    store: Store,
    windows: np.ndarray,
    clusters: np.ndarray,
    report: Report | None = None,
) -> np.ndarray:
    """Sum of the token losses of each window, float64 [W], each through `expert` of its cluster (int [W])."""
    result, lengths = np.zeros(len(windows)), store.lengths(windows)
    with (report or Report()).progress("evaluating, each cluster's expert", int(lengths.sum()), " tok") as advance:
        for cluster in np.unique(clusters).tolist():
            place = np.flatnonzero(clusters == cluster)
            scorer.model.update(expert(cluster))
            result[place] = scorer.window_nll(store, windows[place])
            advance(int(lengths[place].sum()))
    return result


def routed_loss(
    model: Transformer, expert: Callable[[dict, int], dict], store: Store, windows: np.ndarray, clusters: np.ndarray
) -> Callable[[dict], float]:
    """A function from parameters of a network to nats per token, each window through `expert` of its cluster."""
    scorer = Scorer(model)

    def loss(parameters: dict) -> float:
        own, theirs = ranks().own(windows), ranks().own(clusters)
        nll = routed_nll(scorer, partial(expert, parameters), store, own, theirs) if len(own) else np.zeros(0)
        return score_of(store, windows, _of_all_ranks(nll)).nll

    return loss


def validation_loss(model: Transformer, store: Store, windows: np.ndarray) -> Callable[[dict], float]:
    """A function from parameters of `model` to nats per token on the given windows."""
    scorer = Scorer(model)

    def loss(parameters: dict) -> float:
        model.update(parameters)
        own = ranks().own(windows)
        nll = scorer.window_nll(store, own) if len(own) else np.zeros(0)
        return score_of(store, windows, _of_all_ranks(nll)).nll

    return loss


def _of_all_ranks(nll: np.ndarray) -> np.ndarray:
    """The losses of all windows, float64 [W], from those of this rank's."""
    together = ranks()
    if together.size == 1:
        return nll
    every = together.of_all(nll.tolist())
    whole = np.zeros(sum(map(len, every)))
    for rank, part in enumerate(every):
        whole[rank :: together.size] = part
    return whole


def validation_windows(store: Store, tokens: int, seed: int) -> np.ndarray:
    """The windows of the first documents in a seeded order that hold about `tokens` tokens: the same at every call."""
    least = min(store.context_length, LEAST_TOKENS)
    if store.num_tokens < least:
        name = store.directory.parent.name
        raise SlmError(
            f"the validation set of {name} has {store.num_tokens:,} tokens, at least {least} are needed: "
            "add text, raise data.valid_fraction, or name a file with valid=PATH"
        )
    return first_windows(store, min(tokens, store.num_tokens), seed)

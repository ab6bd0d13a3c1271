"""The memory-mapped store of one split: tokens, and the windows that cut them.

A document is stored as its ids and one `</s>`; windows of at most `context_length` tokens cut that sequence without
overlap and nothing is dropped (the last window of a document is short). Opening costs the same for any size.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlx_slm.errors import SlmError
from mlx_slm.storage.artifacts import load_manifest
from mlx_slm.storage.mapped import MappedFile

KIND = "token store"
TOKENS, WINDOWS = "tokens.bin", "windows.npy"
WINDOW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("document", "<u4"), ("bytes", "<u4")])


class Store:
    """Tokens and windows of one split.

    `windows[i]` is (offset, length, document, bytes): where the window starts in the tokens, its tokens, the number of
    its document in this split, and the UTF-8 bytes of text that it stands for.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.manifest = load_manifest(self.directory, KIND)
        info, files = self.manifest["info"], self.manifest["files"]
        self.context_length, self.eos_id = info["context_length"], info["eos_id"]
        self.num_tokens, self.num_documents, self.num_bytes = info["tokens"], info["documents"], info["bytes"]
        self.tokens: MappedFile | np.ndarray = MappedFile(self.directory / TOKENS, info["dtype"], files[TOKENS])
        self.windows: MappedFile | np.ndarray = MappedFile(self.directory / WINDOWS, WINDOW, files[WINDOWS])

    @property
    def num_windows(self) -> int:
        return len(self.windows)

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    def lengths(self, windows: np.ndarray) -> np.ndarray:
        """Tokens of the given windows, int64."""
        return self.windows[:]["length"][windows].astype(np.int64)

    def window_tokens(self, index: int) -> np.ndarray:
        """Ids of one window."""
        window = self.windows[int(index)]
        return self.tokens[int(window["offset"]) : int(window["offset"]) + int(window["length"])]

    def documents(self) -> np.ndarray:
        """(offset, tokens without the end of text) of each document, int64 [documents, 2]."""
        windows = self.windows[:]
        starts = np.flatnonzero(np.diff(windows["document"].astype(np.int64), prepend=-1))
        if not len(starts):
            return np.zeros((0, 2), np.int64)
        lengths = np.add.reduceat(windows["length"].astype(np.int64), starts) - 1
        return np.stack([windows["offset"][starts].astype(np.int64), lengths], axis=1)

    @property
    def name(self) -> str:
        """Of the set."""
        return self.directory.parent.name

    def require_context(self, context_length: int) -> None:
        """Raise SlmError if a configuration asks for windows of another length."""
        if self.context_length != context_length:
            raise SlmError(
                f"data/{self.name} has windows of {self.context_length} tokens, the configuration asks for "
                f"{context_length}: set data.context_length={self.context_length}, or run `mlx-slm prepare {self.name} "
                "--fresh`"
            )

    def require_fit(self, reader: str, context_length: int, tokenizer: str, shorter: bool = False) -> None:
        """Raise SlmError if a model cannot read these windows: it has another tokenizer, by its fingerprint, or another
        context. `shorter`: windows may be shorter than the context."""
        if self.manifest["inputs"]["tokenizer"] != tokenizer:
            raise SlmError(
                f"{reader} and data/{self.name} were made with different tokenizers: prepare or train one again"
            )
        if self.context_length > context_length or (not shorter and self.context_length < context_length):
            raise SlmError(
                f"{reader} has a context of {context_length} tokens, data/{self.name} windows of "
                f"{self.context_length}: run `mlx-slm prepare {self.name} --fresh --set "
                f"data.context_length={context_length}`"
            )

    def require_tokenizer(self, tokenizer) -> None:
        """Raise SlmError if these tokens were made by another tokenizer."""
        if self.manifest["inputs"]["tokenizer"] != tokenizer.fingerprint:
            raise SlmError(
                f"{self.directory} was made by another tokenizer than {tokenizer.directory}: "
                f"run `mlx-slm prepare {self.name} --fresh`"
            )


def first_windows(store: Store, tokens: int | None, seed: int) -> np.ndarray:
    """Indices of the windows of the first documents in a seeded order, until they hold `tokens` tokens (None: all).

    A smaller number gives a prefix of a larger one. Returns int64 [windows]; raises SlmError if the set is smaller.
    """
    if tokens is None:
        return np.arange(store.num_windows)
    if tokens > store.num_tokens:
        raise SlmError(
            f"{tokens:,} tokens of {store.name} were asked for and its train split holds "
            f"{store.num_tokens:,}: ask for at most that, or prepare more text"
        )
    windows = store.windows[:]
    order = np.random.default_rng(seed).permutation(store.num_documents)
    place = np.empty(store.num_documents, np.int64)
    place[order] = np.arange(store.num_documents)
    ranked = np.argsort(place[windows["document"]], kind="stable")
    total = np.cumsum(windows["length"][ranked], dtype=np.int64)
    return ranked[: int(np.searchsorted(total, tokens)) + 1]


def cut_windows(lengths: np.ndarray, token_bytes: np.ndarray, context_length: int) -> np.ndarray:
    """Windows of consecutive documents.

    lengths: tokens of each document with its `</s>`, int [documents]. token_bytes: bytes that each stored token stands
    for, [sum of lengths]. Returns WINDOW [windows], offsets and documents counted from 0.
    """
    lengths = np.asarray(lengths, np.int64)
    counts = -(-lengths // context_length)
    document = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.cumsum(lengths) - lengths
    windows = np.empty(len(document), WINDOW)
    windows["offset"] = starts[document] + within * context_length
    windows["length"] = np.minimum(context_length, lengths[document] - within * context_length)
    windows["document"] = document
    if len(windows):
        windows["bytes"] = np.add.reduceat(token_bytes.astype(np.int64), windows["offset"].astype(np.int64))
    return windows


def length_batches(
    lengths: np.ndarray, step: int, longest: int, batch_tokens: int, batch_rows: int | None = None
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yield (members, rows, padded length) of batches whose members have like lengths, so that few shapes occur.

    Lengths are rounded up to a multiple of `step`, at most `longest`. A batch has `batch_rows` rows, by default
    `batch_tokens` tokens; where few members are left, `rows` is the next power of two.
    """
    padded = np.clip(-(-lengths // step) * step, 1, longest)
    for length in np.unique(padded):
        members = np.flatnonzero(padded == length)
        most = batch_rows or max(1, batch_tokens // int(length))
        for start in range(0, len(members), most):
            chosen = members[start : start + most]
            yield chosen, min(most, 1 << (len(chosen) - 1).bit_length()), int(length)

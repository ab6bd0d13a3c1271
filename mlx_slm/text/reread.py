"""A split in the ids of another tokenizer, so that any model can be scored on the same text."""

from __future__ import annotations

import numpy as np

from mlx_slm.text.store import Store, cut_windows
from mlx_slm.text.tokenizer import Tokenizer


class Reread(Store):
    """The documents of a store by another tokenizer, in memory, in windows of at most `context_length` tokens."""

    def __init__(self, store: Store, written_by: Tokenizer, tokenizer: Tokenizer, context_length: int):
        self.directory, self.context_length, self.eos_id = store.directory, context_length, tokenizer.eos_id
        texts = written_by.decode_all(documents_of(store))
        ids = [np.array([*text, tokenizer.eos_id], np.int32) for text in tokenizer.encode(texts)]
        lengths = np.array([len(text) for text in ids], np.int64)
        self.tokens = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        self.windows = cut_windows(lengths, np.zeros(len(self.tokens), np.int64), context_length)
        first = np.unique(self.windows["document"], return_index=True)[1]
        self.windows["bytes"][first] = [len(text.encode()) for text in texts]
        self.num_tokens, self.num_documents = len(self.tokens), len(texts)
        self.num_bytes = int(self.windows["bytes"].sum())


def documents_of(store: Store) -> list[list[int]]:
    """The ids of each document of a store, without the end of text."""
    return [store.tokens[start : start + length].tolist() for start, length in store.documents().tolist()]

"""A static encoder: a text is the mean of one vector per word piece, as in model2vec. Thousands of windows a second.

`distil` makes one from a sentence encoder; any model2vec directory can be read, and what `distil` writes is one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_slm.embedding.bert import SentenceEncoder, share_of, unknown_id
from mlx_slm.errors import SlmError
from mlx_slm.files import Damaged, load_tokenizer_json, read_arrays, read_json, write_arrays
from mlx_slm.report import Report
from mlx_slm.storage.forms import StaticForm

TABLE = "model.safetensors"
SIF = 1e-4
"""Weight of a word piece of probability p: SIF / (SIF + p), so that frequent ones count little (Arora et al., 2017)."""


class StaticEncoder:
    """A model2vec directory: tokenizer.json, config.json, and a table `embeddings` [pieces, dims].

    `long_windows="start"` takes the first 512 word pieces; "mean" takes all, which is what a mean over parts is.
    """

    shard_windows = 16_384
    max_pieces = 512

    def __init__(self, directory: Path, long_windows: str = "mean"):
        self.directory, self.long_windows = Path(directory), long_windows
        for name in (TABLE, "config.json", "tokenizer.json"):
            if not (self.directory / name).exists():
                raise SlmError(f"{self.directory / name} is missing: a model2vec directory is needed")
        arrays = read_arrays(self.directory / TABLE)
        if "embeddings" not in arrays or "mapping" in arrays or "weights" in arrays:
            raise SlmError(
                f"{self.directory / TABLE} has no plain table `embeddings`: a model2vec directory without vocabulary "
                "quantisation is needed"
            )
        self.normalize = read_json(self.directory / "config.json", StaticForm).get("normalize", True)
        table = arrays["embeddings"].astype(np.float32)
        if table.ndim != 2:
            raise Damaged(f"{self.directory / TABLE}: `embeddings` is no table [pieces, dims]")
        self.dims = table.shape[1]
        self._nothing = len(table)
        self._table = mx.array(np.concatenate([table, np.zeros((1, self.dims), np.float32)]))
        self._tokenizer = load_tokenizer_json(self.directory / "tokenizer.json")
        if self._tokenizer.get_vocab_size(with_added_tokens=True) > len(table):
            raise Damaged(
                f"{self.directory / TABLE} has {len(table):,} rows, fewer than tokenizer.json has word pieces"
            )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._unknown = unknown_id(self._tokenizer)

    def encode(self, texts: list[str]) -> np.ndarray:
        """Embeddings of texts, fp32 [texts, dims]; a text without known word pieces is all zero."""
        pieces = self.pieces(texts)
        result = np.empty((len(texts), self.dims), np.float32)
        order = np.argsort([len(ids) for ids in pieces], kind="stable")
        for start in range(0, len(order), 256):
            members = order[start : start + 256]
            width = -(-max(1, len(pieces[members[-1]])) // 32) * 32
            ids = np.full((len(members), width), self._nothing, np.int32)
            for row, member in enumerate(members):
                ids[row, : len(pieces[member])] = pieces[member]
            summed = np.array(self._table[mx.array(ids)].sum(axis=1))
            counts = np.array([max(1, len(pieces[member])) for member in members], np.float32)
            result[members] = summed / counts[:, None]
        if self.normalize:
            result /= np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-32)
        return result

    def unknown(self, texts: list[str]) -> float:
        """The share of word pieces that it does not know."""
        return share_of(self._unknown, self._tokenizer, texts)

    def pieces(self, texts: list[str]) -> list[list[int]]:
        """Word pieces of texts, unknown ones left out."""
        limit = self.max_pieces if self.long_windows == "start" else None
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [[i for i in e.ids if i != self._unknown][:limit] for e in encoded]


def distil(source: SentenceEncoder, sample: list[str], dims: int, directory: Path, report: Report) -> None:
    """Write a static encoder to `directory`: each word piece alone through `source`, PCA to `dims`, SIF weights by
    the frequency of the word piece in the texts of `sample`."""
    start, end = source._special[:1], source._special[1:]
    vectors = []
    with report.progress("distilling a static encoder", source.vocab_size, " pieces") as advance:
        for first in range(0, source.vocab_size, 2048):
            rows = [[*start, piece, *end] for piece in range(first, min(first + 2048, source.vocab_size))]
            vectors.append(source.embed(rows, length_step=1))
            advance(len(rows))
    table = np.concatenate(vectors)
    table -= table.mean(axis=0, dtype=np.float64).astype(np.float32)
    _, directions = np.linalg.eigh(table.T @ table)
    table = table @ directions[:, ::-1][:, :dims]
    encoded = source._tokenizer.encode_batch_fast(sample, add_special_tokens=False)
    counts = np.bincount([i for e in encoded for i in e.ids], minlength=len(table)) + 1.0
    table *= (SIF / (SIF + counts / counts.sum()))[:, None]
    write_arrays(directory / TABLE, {"embeddings": np.ascontiguousarray(table, np.float32)})
    shutil.copyfile(source.directory / "tokenizer.json", directory / "tokenizer.json")
    config = {"model_type": "model2vec", "architectures": ["StaticModel"], "normalize": True, "hidden_dim": dims}
    (directory / "config.json").write_text(json.dumps(config | {"seq_length": 1_000_000}, indent=1))

"""A BERT-family sentence encoder in MLX (section 2.3): any sentence-transformers directory of the families below.

Word pieces go in, one vector per text comes out: transformer, mean or cls pooling, normalisation as the directory has
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slm.errors import SlmError
from mlx_slm.files import Damaged, load_tokenizer_json, parse_json, read_json, require_form
from mlx_slm.machine import runtime
from mlx_slm.models.layers import split_heads
from mlx_slm.models.ops import gelu, gelu_exact, masked_attention
from mlx_slm.storage.arrays import read_safetensors
from mlx_slm.storage.forms import BertForm, ConfigForm, ModuleForm
from mlx_slm.text.store import length_batches

FAMILIES = {"bert": 0, "roberta": 1, "xlm-roberta": 1}
"""model_type -> whether positions are counted from pad_token_id + 1."""
ACTIVATIONS = {"gelu": gelu_exact, "gelu_new": gelu, "gelu_pytorch_tanh": gelu, "relu": nn.relu}
LIMITS = (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length"))
"""Where a directory says how many word pieces it reads at most: the first that does counts."""
LENGTH_STEP = 16
"""Texts are padded to a multiple of this many word pieces, so that few shapes occur."""


def first_position(config: dict) -> int:
    """The position of the first word piece."""
    return config.get("pad_token_id", 0) + 1 if FAMILIES[config["model_type"]] else 0


def batch_tokens() -> int:
    """Word pieces in a batch: few on a CPU, where scores stay in its cache (384: 37 texts/s, 1,024: 31, 4,096: 23)."""
    return 16_384 if runtime.on_gpu() else 384


class BertLayer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        d, eps = config["hidden_size"], config["layer_norm_eps"]
        self.num_heads = config["num_attention_heads"]
        self.scale = (d // self.num_heads) ** -0.5
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.attention_norm = nn.LayerNorm(d, eps=eps)
        self.up = nn.Linear(d, config["intermediate_size"])
        self.down = nn.Linear(config["intermediate_size"], d)
        self.output_norm = nn.LayerNorm(d, eps=eps)
        self._activation = ACTIVATIONS[config["hidden_act"]]

    def __call__(self, x: mx.array, hidden: mx.array) -> mx.array:
        B, L, d = x.shape
        q, k, v = (split_heads(part, self.num_heads) for part in mx.split(self.qkv(x), 3, axis=-1))
        a = masked_attention(q, k, v, self.scale, hidden).transpose(0, 2, 1, 3).reshape(B, L, d)
        x = self.attention_norm(x + self.out(a))
        return self.output_norm(x + self.down(self._activation(self.up(x))))


class Bert(nn.Module):
    """tokens int [B, L], seen fp32 [B, L] (1 for a token, 0 for padding) -> hidden states fp32 [B, L, dims]."""

    def __init__(self, config: dict):
        super().__init__()
        d = config["hidden_size"]
        self.words = nn.Embedding(config["vocab_size"], d)
        self.positions = nn.Embedding(config["max_position_embeddings"], d)
        self.types = nn.Embedding(config["type_vocab_size"], d)
        self.norm = nn.LayerNorm(d, eps=config["layer_norm_eps"])
        self.layers = [BertLayer(config) for _ in range(config["num_hidden_layers"])]
        self._first = first_position(config)

    def __call__(self, tokens: mx.array, seen: mx.array) -> mx.array:
        places = mx.arange(self._first, self._first + tokens.shape[1])
        x = self.norm(self.words(tokens) + self.positions(places) + self.types.weight[0])
        hidden = (seen - 1) * 1e9
        for layer in self.layers:
            x = layer(x, hidden)
        return x


def rename(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The Hub's names -> ours; queries, keys and values become one matrix; the pooler and buffers are left out."""
    tensors = {name.removeprefix("bert.").removeprefix("roberta."): value for name, value in weights.items()}
    top = {"word": "words", "position": "positions", "token_type": "types"}
    named = {f"{ours}.weight": tensors[f"embeddings.{hub}_embeddings.weight"] for hub, ours in top.items()}
    parts = {
        "attention.output.dense": "out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "up",
        "output.dense": "down",
        "output.LayerNorm": "output_norm",
    }
    for kind in ("weight", "bias"):
        named[f"norm.{kind}"] = tensors[f"embeddings.LayerNorm.{kind}"]
        for layer in range(sum(name.endswith("attention.self.query.weight") for name in tensors)):
            hub = f"encoder.layer.{layer}"
            qkv = [tensors[f"{hub}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            named[f"layers.{layer}.qkv.{kind}"] = mx.concatenate(qkv)
            named |= {f"layers.{layer}.{ours}.{kind}": tensors[f"{hub}.{part}.{kind}"] for part, ours in parts.items()}
    return {name: value.astype(mx.float32) for name, value in named.items()}


def unknown_id(tokenizer) -> int | None:
    """The id of what a `tokenizers.Tokenizer` does not know."""
    model = parse_json(tokenizer.to_str())["model"]
    return tokenizer.token_to_id(model["unk_token"]) if isinstance(model.get("unk_token"), str) else model.get("unk_id")


def share_of(unknown: int | None, tokenizer, texts: list[str]) -> float:
    """The share of an id among the word pieces of texts."""
    pieces = [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    count = sum(map(len, pieces))
    return sum(ids.count(unknown) for ids in pieces) / count if count else 0.0


class SentenceEncoder:
    """A sentence-transformers directory: `encode` gives fp32 [texts, dims].

    A text longer than `max_pieces` word pieces is represented by the mean over its parts, weighted by their pieces
    (`long_windows="mean"`), or by its start. Raises SlmError, naming the file, for a directory that it cannot read.
    """

    shard_windows = 512

    def __init__(self, directory: Path, long_windows: str = "mean"):
        self.directory, self.long_windows = Path(directory), long_windows
        config = _require_json(self.directory / "config.json", ConfigForm)
        if config.get("model_type") not in FAMILIES:
            raise SlmError(
                f"{self.directory}: a sentence encoder of type {config.get('model_type')!r} is not supported; "
                f"supported: {', '.join(FAMILIES)}"
            )
        require_form(config, BertForm, self.directory / "config.json")
        if config["hidden_act"] not in ACTIVATIONS or config.get("position_embedding_type", "absolute") != "absolute":
            raise SlmError(f"{self.directory / 'config.json'}: its activation or positions are not supported")
        self.pooling, self.normalize = _modules(self.directory)
        limit = next(filter(None, map(self._limit, LIMITS)), None)
        self.max_pieces = min(limit or 10**9, config["max_position_embeddings"] - first_position(config))
        self.dims = config["hidden_size"]
        self._tokenizer = load_tokenizer_json(_require(self.directory / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = self._tokenizer.encode("").ids
        self.vocab_size = config["vocab_size"]
        weights = read_safetensors(_require(self.directory / "model.safetensors"))
        self.model = Bert(config)
        try:
            self.model.load_weights(list(rename(weights).items()), strict=True)
        except (KeyError, ValueError) as error:
            raise SlmError(f"{self.directory / 'model.safetensors'} does not fit its config.json: {error}") from error

    def _limit(self, place: tuple[str, str]) -> int | None:
        file, key = self.directory / place[0], place[1]
        limit = read_json(file, dict[str, Any]).get(key) if file.exists() else None
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise Damaged(f"{file}: {key} {limit!r} is not a number of word pieces")
        return limit

    def encode(self, texts: list[str]) -> np.ndarray:
        """Embeddings of texts, fp32 [texts, dims]."""
        pieces = [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        start, end = self._special[:1], self._special[1:]
        size = self.max_pieces - len(start) - len(end)
        rows, owners, weights = [], [], []
        for index, ids in enumerate(pieces):
            parts = [ids[i : i + size] for i in range(0, len(ids), size)] or [[]]
            for part in parts[:1] if self.long_windows == "start" else parts:
                rows.append(start + part + end)
                owners.append(index)
                weights.append(max(1, len(part)))
        vectors, shares = self.embed(rows), np.array(weights, np.float32)
        result = np.zeros((len(texts), self.dims), np.float32)
        np.add.at(result, owners, vectors * shares[:, None])
        if self.normalize:
            return result / np.linalg.norm(result, axis=1, keepdims=True)
        return result / np.bincount(owners, shares)[:, None].astype(np.float32)

    def unknown(self, texts: list[str]) -> float:
        """The share of word pieces that it does not know."""
        return share_of(unknown_id(self._tokenizer), self._tokenizer, texts)

    def embed(self, rows: list[list[int]], length_step: int = LENGTH_STEP) -> np.ndarray:
        """Embeddings of rows of word piece ids, special ones included: fp32 [rows, dims]."""
        lengths = np.array([len(row) for row in rows])
        result = np.empty((len(rows), self.dims), np.float32)
        batches = length_batches(lengths, length_step, self.max_pieces, batch_tokens())

        def vectors(lane: int, batch: tuple) -> mx.array:
            members, count, length = batch
            tokens = np.zeros((count, length), np.int32)
            seen = np.zeros((count, length), np.float32)
            seen[len(members) :, 0] = 1
            for row, member in enumerate(members):
                tokens[row, : lengths[member]] = rows[member]
                seen[row, : lengths[member]] = 1
            return self._embed(mx.array(tokens), mx.array(seen))

        for (members, *_), embedded in runtime.in_lanes(batches, vectors):
            result[members] = np.array(embedded)[: len(members)]
        return result

    def _embed(self, tokens: mx.array, seen: mx.array) -> mx.array:
        x = self.model(tokens, seen)
        weights = seen / seen.sum(axis=1, keepdims=True)
        x = x[:, 0] if self.pooling == "cls" else (x * weights[..., None]).sum(axis=1)
        return x / mx.linalg.norm(x, axis=-1, keepdims=True) if self.normalize else x


def _modules(directory: Path) -> tuple[str, bool]:
    """(pooling, normalised) as modules.json says; raises SlmError for modules that are not known here."""
    pooling, normalize = None, False
    for module in _require_json(directory / "modules.json", list[ModuleForm]):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            config = _require_json(directory / module["path"] / "config.json", dict[str, Any])
            modes = [config["pooling_mode"]] if "pooling_mode" in config else []
            modes += [k.split("_")[2] for k, v in config.items() if k.startswith("pooling_mode_") and v is True]
            pooling = modes[0] if len(modes) == 1 else "+".join(modes)
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise SlmError(f"{directory / 'modules.json'}: a module {kind!r} is not supported")
    if pooling not in ("mean", "cls"):
        raise SlmError(f"{directory}: pooling {pooling or 'none'} is not supported; supported: mean, cls")
    return pooling, normalize


def _require(path: Path) -> Path:
    if not path.exists():
        raise SlmError(f"{path} is missing: a sentence-transformers directory with safetensors weights is needed")
    return path


def _require_json(path: Path, form: type):
    return read_json(_require(path), form)

"""An exported model as a GGUF file for llama.cpp, with the `gguf` package (extra: gguf)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import sentencepiece

from mlx_slm.errors import SlmError
from mlx_slm.files import load_tokenizer_json, read_bytes, read_json
from mlx_slm.machine.trees import flat
from mlx_slm.models.families import FAMILIES
from mlx_slm.models.shape import Shape
from mlx_slm.storage.forms import ConfigForm
from mlx_slm.text.tokenizer import CHAT_TEMPLATE, MODEL_BYTES, MODEL_FILE

TYPES = {"f16": "F16", "q8_0": "Q8_0", "f32": "F32"}
"""Of matrices; what is added, scales or is looked up by position is f32."""
PRE_TOKENIZERS = {
    '[["ByteLevel", true]]': "gpt-2",
    '[["Digits", true], ["ByteLevel", true]]': "smollm",
}
"""llama.cpp's names for the pre-tokenizers of byte-level BPE that it does as `tokenizers` does."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's kinds of tokens."""


def write_gguf(path: Path, model: Path, shape: Shape, parameters: dict, kind: str = "f16") -> dict:
    """Write parameters and the tokenizer of the model directory `model` to the file `path`, whole or not at all.

    Returns `{"bytes", "bits_per_weight"}`. Raises SlmError where the package is missing, or for a tokenizer that
    llama.cpp does not have.
    """
    gguf = _package()
    family = FAMILIES[shape.family]
    facts = {f"{family.name}.{key}": value for key, value in family.gguf_facts(shape).items()}
    tensors = family.to_gguf(shape, flat(parameters))
    vocabulary = _vocabulary(model, shape.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(temporary, family.name)
    try:
        writer.add_name(path.stem)
        for key, value in facts.items():
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
        writer.add_vocab_size(shape.vocab_size)
        writer.add_file_type(getattr(gguf.LlamaFileType, {"f32": "ALL_F32"}.get(kind, f"MOSTLY_{TYPES[kind]}")))
        for key, value in vocabulary.items():
            getattr(writer, f"add_{key}")(value)
        end = read_json(model / "config.json", ConfigForm)["eos_token_id"]
        for add in (writer.add_bos_token_id, writer.add_eos_token_id):
            add(end[0] if isinstance(end, list) else end)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        for name, tensor in tensors.items():
            numbers = np.array(tensor.astype(mx.float32))
            wanted = getattr(gguf.GGMLQuantizationType, TYPES[_kind(name, numbers, kind)])
            writer.add_tensor(name, gguf.quants.quantize(numbers, wanted), raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        size = temporary.stat().st_size
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return {"bytes": size, "bits_per_weight": 8 * size / shape.num_parameters}


def _kind(name: str, numbers: np.ndarray, kind: str) -> str:
    if numbers.ndim == 1 or name.startswith("position_embd"):
        return "f32"
    return "f16" if kind == "q8_0" and numbers.shape[1] % 32 else kind


def _package():
    try:
        import gguf
    except ImportError as error:
        raise SlmError("--format gguf needs the package gguf: pip install 'mlx-slm[gguf]'") from error
    return gguf


def _vocabulary(model: Path, size: int) -> dict:
    """What a GGUF file says of a tokenizer with `size` ids, by the names of the writer's methods."""
    parts = _of_sentencepiece(model) if (model / MODEL_FILE).exists() else _of_byte_level(model)
    tokens, kinds = parts["token_list"], parts["token_types"]
    if len(tokens) > size:
        raise SlmError(f"{model}: its tokenizer has {len(tokens):,} ids, its embedding {size:,} rows")
    missing = range(len(tokens), size)
    tokens += [f"[PAD{i}]" for i in missing]
    kinds += [UNUSED for _ in missing]
    if "token_scores" in parts:
        parts["token_scores"] += [-1e4 for _ in missing]
    return parts


def _of_sentencepiece(model: Path) -> dict:
    """Pieces with their scores: llama.cpp merges by score, as sentencepiece does."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=read_bytes(model / MODEL_FILE, MODEL_BYTES))
    ids = range(pieces.get_piece_size())

    def kind(i: int) -> int:
        if pieces.is_byte(i):
            return BYTE
        return UNKNOWN if pieces.is_unknown(i) else CONTROL if pieces.is_control(i) else NORMAL

    return {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_list": [pieces.id_to_piece(i) for i in ids],
        "token_scores": [pieces.get_score(i) for i in ids],
        "token_types": [kind(i) for i in ids],
        "add_space_prefix": False,
        "unk_token_id": pieces.unk_id(),
        "chat_template": CHAT_TEMPLATE,
    }


def _of_byte_level(model: Path) -> dict:
    """Tokens with their merges, of a byte-level BPE whose pre-tokenizer llama.cpp has."""
    settings = json.loads(load_tokenizer_json(model / "tokenizer.json").to_str())
    steps = list(_steps(settings["pre_tokenizer"]))
    known = PRE_TOKENIZERS.get(json.dumps(steps))
    if settings["model"]["type"] != "BPE" or settings["normalizer"] or known is None:
        listed = ", ".join(name for name, _ in steps) or "none"
        raise SlmError(
            f"{model}: its tokenizer ({settings['model']['type']}, pre-tokenizer {listed}) is not one that is written "
            "to GGUF here: use llama.cpp's convert_hf_to_gguf.py"
        )
    tokens = {index: token for token, index in settings["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, NORMAL)
    for added in settings["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    ids = range(max(tokens) + 1)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in settings["model"]["merges"]]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": known,
        "token_list": [tokens.get(i, f"[PAD{i}]") for i in ids],
        "token_types": [kinds.get(i, UNUSED) for i in ids],
        "token_merges": merges,
    }


def _steps(pre: dict[str, Any] | None) -> Iterator[tuple[str, bool]]:
    """(name, whether it splits as the plain one does) of each pre-tokenizer."""
    whole = [pre] if pre else []
    for step in pre["pretokenizers"] if pre and pre["type"] == "Sequence" else whole:
        plain = step.get("individual_digits", True) and step.get("use_regex", True)
        yield step["type"], plain and not step.get("add_prefix_space", False)

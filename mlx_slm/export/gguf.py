"""An exported model as a GGUF file for llama.cpp, with the `gguf` package (extra: gguf)."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_slm.errors import SlmError
from mlx_slm.files import load_tokenizer_json
from mlx_slm.machine.trees import flat
from mlx_slm.models.families import FAMILIES
from mlx_slm.models.shape import Shape
from mlx_slm.text.hub_tokenizer import chat_template_of, end_of_text

TYPES = {"f16": "F16", "q8_0": "Q8_0", "f32": "F32"}
"""Of matrices; what is added, scales or is looked up by position is f32."""
SENTENCEPIECE = "sentencepiece"
PRE_TOKENIZERS = {
    '[["ByteLevel", true]]': "gpt-2",
    '[["Digits", true], ["ByteLevel", true]]': "smollm",
    '[["Metaspace", true]]': SENTENCEPIECE,
}
"""llama.cpp's names for the pre-tokenizers that it does as `tokenizers` does."""
NEVER = (None, "never")
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
    end, start = end_of_text(model), load_tokenizer_json(model / "tokenizer.json").encode("").ids
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(temporary, family.name)
    try:
        writer.add_name(path.stem)
        for key, value in facts.items():
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
        writer.add_vocab_size(shape.vocab_size)
        writer.add_file_type(getattr(gguf.LlamaFileType, {"f32": "ALL_F32"}.get(kind, f"MOSTLY_{TYPES[kind]}")))
        for key, value in vocabulary.items():
            getattr(writer, f"add_{key}")(value)
        writer.add_eos_token_id(end)
        writer.add_bos_token_id(start[0] if start else end)
        writer.add_add_bos_token(bool(start))
        if template := chat_template_of(model):
            writer.add_chat_template(template)
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
        writer.close()
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
    settings = json.loads(load_tokenizer_json(model / "tokenizer.json").to_str())
    steps = list(_steps(settings["pre_tokenizer"]))
    known = PRE_TOKENIZERS.get(json.dumps(steps))
    if settings["model"]["type"] != "BPE" or settings["normalizer"] or known is None:
        listed = ", ".join(name for name, _ in steps) or "none"
        raise SlmError(
            f"{model}: its tokenizer ({settings['model']['type']}, pre-tokenizer {listed}) is not one that is written "
            "to GGUF here: use llama.cpp's convert_hf_to_gguf.py"
        )
    parts = _tokens(settings) | (_by_score(settings) if known == SENTENCEPIECE else _by_merges(settings, known))
    tokens, kinds = parts["token_list"], parts["token_types"]
    if len(tokens) > size:
        raise SlmError(f"{model}: its tokenizer has {len(tokens):,} ids, its embedding {size:,} rows")
    missing = range(len(tokens), size)
    tokens += [f"[PAD{i}]" for i in missing]
    kinds += [UNUSED for _ in missing]
    if "token_scores" in parts:
        parts["token_scores"] += [float(-len(tokens)) for _ in missing]
    return parts


def _tokens(settings: dict) -> dict:
    """The tokens by id, with their kinds."""
    tokens = {index: token for token, index in settings["model"]["vocab"].items()}
    is_byte = settings["model"]["byte_fallback"]
    kinds = {i: BYTE if is_byte and re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL for i, token in tokens.items()}
    for added in settings["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if (unknown := settings["model"]["unk_token"]) is not None:
        kinds[settings["model"]["vocab"][unknown]] = UNKNOWN
    ids = range(max(tokens) + 1)
    return {
        "token_list": [tokens.get(i, f"[PAD{i}]") for i in ids],
        "token_types": [kinds.get(i, UNUSED) for i in ids],
    }


def _by_score(settings: dict) -> dict:
    """sentencepiece's: pieces merge by the score of what they make, the earliest merge first."""
    vocabulary = settings["model"]["vocab"]
    scores = dict.fromkeys(range(max(vocabulary.values()) + 1), 0.0)
    for rank, pair in reversed(list(enumerate(settings["model"]["merges"]))):
        scores[vocabulary["".join(pair)]] = -float(rank)
    return {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_scores": list(scores.values()),
        "add_space_prefix": False,
        "unk_token_id": vocabulary[settings["model"]["unk_token"]],
    }


def _by_merges(settings: dict, pre: str) -> dict:
    """A byte-level BPE whose pre-tokenizer llama.cpp has."""
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in settings["model"]["merges"]]
    return {"tokenizer_model": "gpt2", "tokenizer_pre": pre, "token_merges": merges}


def _steps(pre: dict[str, Any] | None) -> Iterator[tuple[str, bool]]:
    """(name, whether it splits as the plain one does) of each pre-tokenizer."""
    whole = [pre] if pre else []
    for step in pre["pretokenizers"] if pre and pre["type"] == "Sequence" else whole:
        plain = step.get("individual_digits", True) and step.get("use_regex", True) and not step.get("split", False)
        yield step["type"], plain and not step.get("add_prefix_space", False) and step.get("prepend_scheme") in NEVER

"""A tokenizer that came with a model: its `tokenizer.json`, in place of a trained one (`pretrain --init-from`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as HuggingFace

from mlx_slm.errors import SlmError
from mlx_slm.files import JSON_BYTES, Damaged, load_tokenizer_json, read_json, read_text
from mlx_slm.storage.artifacts import load_manifest, new_artifact, sha256, verify
from mlx_slm.storage.forms import ConfigForm, TokenizerSettings
from mlx_slm.text.tokenizer import CHAT_TEMPLATE, FILES, KIND, MODEL_FILE, SPACE, Tokenizer, TrainedTokenizer

JSON_FILE, CONFIG_FILE = FILES
TEMPLATE_FILE = "chat_template.jinja"


class HuggingFaceTokenizer(Tokenizer):
    """One that came with a model. Special tokens that are written out in a text are encoded as text."""

    def __init__(self, directory: Path, eos_id: int, manifest: dict | None = None):
        self.manifest, self.directory, self.eos_id = manifest or {}, Path(directory), eos_id
        self.fingerprint = sha256(self.directory / JSON_FILE)
        self._tokenizer = load_tokenizer_json(self.directory / JSON_FILE)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._encoder = _without_special_pieces(self._tokenizer)
        self.token_bytes = self._token_bytes()
        self.vocab_size = len(self.token_bytes)
        if not 0 <= self.eos_id < self.vocab_size:
            raise Damaged(f"{self.directory}: its end-of-text token {self.eos_id} is not one of its tokens")

    def export(self, directory: Path) -> None:
        """As they came with the model, but that the end of text alone stands in front of a text, as in training, and
        that a chat of a model without a template for it is read as the plainest."""
        from tokenizers import processors

        settings = json.loads((self.directory / CONFIG_FILE).read_text())
        if (self.directory / TEMPLATE_FILE).exists():
            shutil.copyfile(self.directory / TEMPLATE_FILE, directory / TEMPLATE_FILE)
        else:
            settings.setdefault("chat_template", CHAT_TEMPLATE)
        (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")
        tokenizer = HuggingFace.from_str(self._tokenizer.to_str())
        end = tokenizer.id_to_token(self.eos_id)
        start = processors.TemplateProcessing(f"{end} $A", f"{end} $A $B", [(end, self.eos_id)])
        levels = json.loads(self._tokenizer.to_str())["post_processor"]
        byte_level = [processors.ByteLevel(trim_offsets=False)] if "ByteLevel" in json.dumps(levels) else []
        tokenizer.post_processor = processors.Sequence([*byte_level, start])
        tokenizer.save(str(directory / JSON_FILE))

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._encoder.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_all(self, batch: list[list[int]]) -> list[str]:
        return self._tokenizer.decode_batch(batch, skip_special_tokens=True)

    def _token_bytes(self) -> np.ndarray:
        """Exact for byte-level BPE, and for sentencepiece's but a first space; special tokens stand for no text."""
        sizes = np.array([min(len(piece), 255) for piece in piece_bytes(self._tokenizer)], np.uint8)
        for index, token in self._tokenizer.get_added_tokens_decoder().items():
            if token.special:
                sizes[index] = 0
        return sizes


def _without_special_pieces(tokenizer: HuggingFace) -> HuggingFace:
    """The same for encoding: a unigram model would take a special token that is written out in a text for a piece."""
    settings = json.loads(tokenizer.to_str())
    special = {token["content"] for token in settings["added_tokens"] if token["special"]}
    if settings["model"]["type"] != "Unigram":
        return tokenizer
    unwritten = {token: f"\ue000{token}\ue001" for token in special}
    settings["model"]["vocab"] = [[unwritten.get(piece, piece), score] for piece, score in settings["model"]["vocab"]]
    for token in settings["added_tokens"]:
        token["content"] = unwritten.get(token["content"], token["content"])
    encoder = HuggingFace.from_str(json.dumps(settings))
    encoder.encode_special_tokens = True
    return encoder


PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_OF = {chr(byte): byte for byte in PRINTED} | {
    chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in PRINTED)
}
"""Characters by which byte-level BPE writes bytes (GPT-2's table)."""


def piece_bytes(tokenizer: HuggingFace) -> list[bytes]:
    """The bytes that each id of a tokenizer stands for, perhaps a part of a character."""
    settings = json.loads(tokenizer.to_str())
    byte_level = "ByteLevel" in json.dumps([settings["decoder"], settings["pre_tokenizer"]])
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, index in vocabulary.items():
        if index in added:
            pieces[index] = piece.encode()
        elif byte_level:
            pieces[index] = bytes(BYTE_OF[c] for c in piece) if all(c in BYTE_OF for c in piece) else piece.encode()
        elif len(piece) == 6 and piece.startswith("<0x"):
            pieces[index] = bytes([int(piece[3:5], 16)])
        else:
            pieces[index] = piece.replace(SPACE, " ").encode()
    return pieces


def open_tokenizer(directory: Path) -> Tokenizer:
    """The workspace's tokenizer, trained or taken from a model."""
    manifest = load_manifest(directory, KIND)
    files = manifest["files"]
    if JSON_FILE not in files or not all("sha256" in entry for entry in files.values()):
        raise Damaged(f"{directory} is not a tokenizer with its {JSON_FILE}; remove it and make it again")
    if MODEL_FILE in files:
        return TrainedTokenizer(directory)
    verify(directory, manifest)
    return HuggingFaceTokenizer(directory, manifest["info"].get("eos_id", -1), manifest)


def tokenizer_of(model: Path) -> Tokenizer:
    """The tokenizer of a model directory; raises SlmError if there is no tokenizer.json, or no end-of-text token."""
    require_tokenizer_json(model)
    return HuggingFaceTokenizer(model, end_of_text(model))


def import_tokenizer(model: Path, directory: Path, inputs: dict) -> Tokenizer:
    """Write the tokenizer of a model directory to `directory`; one that we exported stays a sentencepiece model.

    Raises SlmError if there is no tokenizer.json, or no end-of-text token.
    """
    require_tokenizer_json(model)
    chat_template_of(model)
    settings = _settings(model)
    ours = (model / MODEL_FILE).exists() and settings.get("tokenizer_class") == "PreTrainedTokenizerFast"
    with new_artifact(directory, KIND, inputs) as (path, info):
        for name in (MODEL_FILE, *FILES) if ours else (*FILES, TEMPLATE_FILE):
            if (model / name).exists():
                shutil.copyfile(model / name, path / name)
        if not ours:
            info["eos_id"] = end_of_text(model)
            if not settings:
                _write_config(path, info["eos_id"])
    return open_tokenizer(directory)


def _write_config(directory: Path, eos_id: int) -> None:
    """A tokenizer_config.json for a model that has none, so that what is exported has one."""
    end = load_tokenizer_json(directory / JSON_FILE).id_to_token(eos_id)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end}
    (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=1))


def same_ids(model: Path, directory: Path) -> bool:
    """Whether the tokenizers of two directories give a text the same ids, whatever else their files say."""
    require_tokenizer_json(model)
    decisive = ("model", "normalizer", "pre_tokenizer", "added_tokens")
    one, other = (json.loads(load_tokenizer_json(path / JSON_FILE).to_str()) for path in (model, directory))
    return all(one[part] == other[part] for part in decisive)


def require_tokenizer_json(model: Path) -> None:
    if not (model / JSON_FILE).exists():
        raise SlmError(
            f"{model} has no {JSON_FILE}: load its tokenizer with transformers' AutoTokenizer and save it there with "
            "save_pretrained"
        )


def chat_template_of(model: Path) -> str | None:
    """How a chat becomes text, by the files of a model directory."""
    if (model / TEMPLATE_FILE).exists():
        return read_text(model / TEMPLATE_FILE, JSON_BYTES)
    template = _settings(model).get("chat_template")
    return template if isinstance(template, str) else None


def _settings(model: Path) -> dict:
    return read_json(model / CONFIG_FILE, TokenizerSettings) if (model / CONFIG_FILE).exists() else {}


def end_of_text(model: Path) -> int:
    """The id that ends a text, by the files of a model directory; raises SlmError where none is named."""
    settings = _settings(model)
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    eos_id = load_tokenizer_json(model / JSON_FILE).token_to_id(token) if token else None
    if eos_id is None and (model / "config.json").exists():
        named = read_json(model / "config.json", ConfigForm).get("eos_token_id")
        eos_id = next(iter(named), None) if isinstance(named, list) else named
    if eos_id is None:
        raise SlmError(f"{model}: no end-of-text token: name one as eos_token in {CONFIG_FILE}")
    return int(eos_id)

"""The tokenizer: sentencepiece BPE, lossless, trained on the generic set, and its Hugging Face form.

`decode(encode(text)) == text` for any text without U+2581 (sentencepiece's own sign for a space). One library encodes
everywhere in here; `tokenizer.json` gives the same ids in mlx-lm and transformers.
"""

from __future__ import annotations

import heapq
import io
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from mlx_slm.config.schema import TokenizerConfig
from mlx_slm.errors import SlmError
from mlx_slm.files import Damaged, read_bytes
from mlx_slm.storage.artifacts import load_manifest, new_artifact, verify

KIND = "tokenizer"
MODEL_FILE = "tokenizer.model"
FILES = ("tokenizer.json", "tokenizer_config.json")
SPACE = "\u2581"
UNKNOWN, END = "<unk>", "</s>"
CHAT_TEMPLATE = "{{ eos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The plainest: a chat is the contents of its messages, one after the other."""
PIECE_BYTES = 4000
MODEL_BYTES = 256 << 20


class Tokenizer(ABC):
    """Text <-> ids. `token_bytes` is uint8 [vocab_size]: the UTF-8 bytes of text that each id stands for."""

    directory: Path
    manifest: dict
    fingerprint: str
    vocab_size: int
    eos_id: int
    token_bytes: np.ndarray

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Write the files of a model directory that tell other programs how to read text."""

    @abstractmethod
    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special ids."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""

    @abstractmethod
    def decode_all(self, batch: list[list[int]]) -> list[str]:
        """Texts of many lists of ids."""


class TrainedTokenizer(Tokenizer):
    """sentencepiece's, trained on the generic set."""

    def __init__(self, directory: Path):
        self.manifest = load_manifest(directory, KIND)
        verify(directory, self.manifest)
        self.directory = Path(directory)
        try:
            data = read_bytes(self.directory / MODEL_FILE, MODEL_BYTES)
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data or b"nothing")
        except RuntimeError as error:
            raise Damaged(
                f"{self.directory / MODEL_FILE} is not a sentencepiece model; make the tokenizer again"
            ) from error
        self.vocab_size = self._model.get_piece_size()
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise Damaged(f"{self.directory / MODEL_FILE} has no end-of-text token; make the tokenizer again")
        self.fingerprint = self.manifest["files"][MODEL_FILE]["sha256"]
        self.token_bytes = np.array([self._bytes(i) for i in range(self.vocab_size)], np.uint8)

    def export(self, directory: Path) -> None:
        shutil.copyfile(self.directory / MODEL_FILE, directory / MODEL_FILE)
        write_huggingface(self._model, directory)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts, out_type=int, num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def decode_all(self, batch: list[list[int]]) -> list[str]:
        return self._model.decode(batch)

    def _bytes(self, index: int) -> int:
        if self._model.is_byte(index):
            return 1
        if self._model.is_control(index) or self._model.is_unknown(index):
            return 0
        return len(self._model.id_to_piece(index).replace(SPACE, " ").encode())


def sample_documents(documents: Iterable[tuple[bytes, str]], config: TokenizerConfig) -> list[str]:
    """Draw `sample_bytes` of text from (digest, text) pairs: those with the smallest digests, whatever their order.

    Reads at most `scan_bytes`. Digests are hashes, so the sample is uniform over documents, and repeatable.
    """
    heap: list[tuple[int, str]] = []
    size = scanned = 0
    salt = config.seed * 0x9E3779B97F4A7C15
    for digest, text in documents:
        key = (int.from_bytes(digest[:8], "little") ^ salt) & (2**64 - 1)
        heapq.heappush(heap, (-key, text))
        length = len(text.encode())
        size, scanned = size + length, scanned + length
        while len(heap) > 1 and size - len(heap[0][1].encode()) >= config.sample_bytes:
            size -= len(heapq.heappop(heap)[1].encode())
        if scanned >= config.scan_bytes:
            break
    return [text for _, text in sorted(heap, reverse=True)]


def pieces(text: str, limit: int = PIECE_BYTES) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` bytes, behind white space where there is any; joined they are the text.

    sentencepiece's trainer silently skips anything longer than its `max_sentence_length`.
    """
    part: list[str] = []
    size = 0
    for unit in re.findall(r"[^\n ]*[\n ]+|[^\n ]+", text):
        for chunk in (unit[i : i + limit // 4] for i in range(0, len(unit), limit // 4)):
            length = len(chunk.encode())
            if size + length > limit:
                yield "".join(part)
                part, size = [], 0
            part.append(chunk)
            size += length
    if part:
        yield "".join(part)


def train_tokenizer(directory: Path, texts: list[str], config: TokenizerConfig, inputs: dict) -> Tokenizer:
    """Train on `texts` and write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json` to `directory`.

    Raises SlmError where the text is too small for `tokenizer.vocab_size`.
    """
    if not texts:
        raise SlmError("the generic set has no text to train the tokenizer on")
    buffer = io.BytesIO()
    # A list, not a generator: Ctrl-C inside the trainer's iteration would look like a failure of the trainer.
    sentences = [piece for text in texts for piece in pieces(text)]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=config.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            unk_piece=UNKNOWN,
            eos_id=1,
            eos_piece=END,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        size = sum(len(text.encode()) for text in texts)
        raise SlmError(_explain_training(str(error), config.vocab_size, size)) from error
    model = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    with new_artifact(directory, KIND, inputs) as (path, info):
        (path / MODEL_FILE).write_bytes(buffer.getvalue())
        write_huggingface(model, path)
        info.update(vocab_size=model.get_piece_size(), trained_on_bytes=sum(len(text.encode()) for text in texts))
    return TrainedTokenizer(directory)


def _explain_training(message: str, vocab_size: int, size: int) -> str:
    if needed := re.search(r"smaller than required_chars\D+\d+ vs (\d+)", message):
        return (
            f"tokenizer.vocab_size {vocab_size} is too small: 256 bytes and this text's characters "
            f"need {needed[1]} at least"
        )
    if best := re.search(r"too high .*<= (\d+)", message):
        return (
            f"tokenizer.vocab_size {vocab_size} is more than {size:,} bytes of generic text support: "
            f"set it to {best[1]} or less, or add text"
        )
    return f"tokenizer.vocab_size {vocab_size}: no tokenizer comes of {size:,} bytes of generic text ({message})"


def write_huggingface(model: sentencepiece.SentencePieceProcessor, directory: Path) -> None:
    """Write the tokenizer as `tokenizers` BPE with byte fallback, so that whole documents get sentencepiece's ids.

    Where special tokens are asked for, `</s>` stands in front of a text, as in training.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as HuggingFace

    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    tokenizer = HuggingFace(
        models.BPE(vocab, _merges(model, vocab), unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (UNKNOWN, END)])
    start = [(END, model.eos_id())]
    tokenizer.post_processor = processors.TemplateProcessing(f"{END} $A", f"{END} $A $B", start)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
        "bos_token": END,
        "eos_token": END,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _merges(model: sentencepiece.SentencePieceProcessor, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Merges in the order sentencepiece applies them: by the score (the rank) of the piece that a pair makes."""
    merges = []
    for piece, index in vocab.items():
        if model.is_byte(index) or model.is_control(index) or model.is_unknown(index):
            continue
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        splits.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(-model.get_score(index), pair) for pair in splits]
    return [pair for _, pair in sorted(merges, key=lambda item: item[0])]

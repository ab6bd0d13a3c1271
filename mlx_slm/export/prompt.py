"""How text becomes the ids that an exported model continues, for `generate` and `serve` alike.

A text begins as in training: behind `</s>`. Special tokens that are written out in it are text.
"""

from __future__ import annotations

from pathlib import Path

from mlx_slm.errors import SlmError
from mlx_slm.export.start import longest_context, text_config
from mlx_slm.files import load_tokenizer_json, read_json
from mlx_slm.storage.artifacts import MANIFEST
from mlx_slm.storage.forms import ConfigForm
from mlx_slm.text.hub_tokenizer import piece_bytes
from mlx_slm.text.tokenizer import CHAT_TEMPLATE


def not_loaded(called: str | Path, error: Exception) -> SlmError:
    """Whatever mlx-lm or transformers do not like about a directory of somebody else's, in one sentence."""
    reason = " ".join(str(error).split())[:300]
    return SlmError(f"{called}: mlx-lm cannot load it ({type(error).__name__}: {reason})")


class Prompts:
    """What the model directory `path` reads: `context` tokens (None: not said), ids below `vocab_size`, of which the
    tokenizer has `num_tokens`.

    `tokenizer` is mlx-lm's; it encodes where there is no tokenizer.json.
    """

    def __init__(self, path: Path, tokenizer):
        config = read_json(path / "config.json", ConfigForm)
        self.name, self.context = path.name, longest_context(config)
        self.learned_positions = "n_positions" in config
        """Whether positions are rows of a table, of which there are no more than the context."""
        ours = (path / MANIFEST).exists()
        self.plain_chat = tokenizer.chat_template == CHAT_TEMPLATE or (ours and not tokenizer.chat_template)
        """Whether a chat is the contents of its messages, one after the other."""
        self._tokenizer, self._own = tokenizer, None
        self.start: list[int] = []
        self.num_tokens, self._pieces = len(tokenizer), list[bytes]()
        if (path / "tokenizer.json").exists():
            self._own = load_tokenizer_json(path / "tokenizer.json")
            self._own.no_truncation()
            self._own.no_padding()
            self._own.encode_special_tokens = True
            self._pieces = piece_bytes(self._own)
            self.num_tokens = len(self._pieces)
            empty = self._own.encode("a")
            self.start = empty.ids[: empty.special_tokens_mask.index(0)]
        if not self.start and ours:
            self.start = [tokenizer.eos_token_id]
        self.vocab_size = text_config(config).get("vocab_size") or self.num_tokens
        self.num_tokens = min(self.num_tokens, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Ids of a text with the start in front; of a text that must be longer than the context, of its end."""
        if self._own is None:
            ids = self._tokenizer.encode(text)
        else:
            text = text[-self._most_characters :] if self._most_characters else text
            ids = [*self.start, *self._own.encode(text, add_special_tokens=False).ids]
        if not ids:
            raise SlmError(
                f"the prompt is empty, and nothing stands in front of a text for {self.name}: give some text"
            )
        self.require_known(ids)
        return ids

    def piece(self, token: int) -> bytes:
        """UTF-8 of a token, perhaps a part of a character."""
        return self._pieces[token] if self._own else self._tokenizer.decode([token]).encode()

    @property
    def _most_characters(self) -> int | None:
        """Longer texts are more tokens than the context."""
        return self.context * max(map(len, self._pieces)) if self.context and self._pieces else None

    def require_short(self, text: str) -> None:
        """Raise SlmError for a text that cannot fit the context, before it is encoded."""
        if self._most_characters and len(text) > self._most_characters:
            raise SlmError(
                f"{len(text):,} characters are more than the context of {self.name}, {self.context:,} tokens"
            )

    def require_known(self, ids: list[int]) -> None:
        """Raise SlmError for an id that the embedding does not have."""
        if max(ids, default=0) >= self.vocab_size:
            raise SlmError(
                f"{self.name}: its tokenizer gives the id {max(ids)}, its embedding has {self.vocab_size} rows: "
                "take the tokenizer that belongs to the model"
            )

    def fit(self, ids: list[int], max_tokens: int, said: bool = True) -> tuple[list[int], int, list[str]]:
        """(ids, max_tokens, what was changed) so that both fit the context.

        A prompt as long as the context keeps its start and its end, half a context in all, so that there is room to
        go on; otherwise only `max_tokens` is lowered, which is noted where the number was `said` by somebody.
        """
        context, notes = self.context, list[str]()
        if not context or len(ids) + max_tokens <= context:
            return ids, max_tokens, notes
        if len(ids) >= context:
            keep = max(1, context // 2 - len(self.start))
            start = self.start[: max(0, context - 1 - keep)]
            notes.append(
                f"the prompt is longer than the context of {self.name}, {context:,} tokens: its last {keep:,} were read"
            )
            ids = [*start, *ids[-keep:]]
        if len(ids) + max_tokens > context:
            notes += said * [
                f"max_tokens {max_tokens:,} was lowered to {context - len(ids):,}: "
                f"the context of {self.name} is {context:,}"
            ]
            max_tokens = context - len(ids)
        return ids, max_tokens, notes

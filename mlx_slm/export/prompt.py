"""How text becomes the ids that an exported model continues, for `generate` and `serve` alike.

A text begins as in training: behind `</s>`. Special tokens that are written out in it are text.
"""

from __future__ import annotations

from pathlib import Path

from mlx_slm.errors import SlmError
from mlx_slm.export.start import longest_context
from mlx_slm.files import load_tokenizer_json, read_json
from mlx_slm.storage.artifacts import MANIFEST
from mlx_slm.storage.forms import ConfigForm
from mlx_slm.text.tokenizer import CHAT_TEMPLATE


def not_loaded(called: str | Path, error: Exception) -> SlmError:
    """Whatever mlx-lm or transformers do not like about a directory of somebody else's, in one sentence."""
    reason = " ".join(str(error).split())[:300]
    return SlmError(f"{called}: mlx-lm cannot load it ({type(error).__name__}: {reason})")


class Prompts:
    """What the model directory `path` reads: `context` tokens (None: not said), ids below `vocab_size`.

    `tokenizer` is mlx-lm's; it encodes where there is no tokenizer.json.
    """

    def __init__(self, path: Path, tokenizer):
        config = read_json(path / "config.json", ConfigForm)
        self.name, self.vocab_size = path.name, config.get("vocab_size")
        self.context = longest_context(config)
        self.plain_chat = tokenizer.chat_template == CHAT_TEMPLATE or (path / MANIFEST).exists()
        """Whether a chat is the contents of its messages, one after the other."""
        self._tokenizer, self._own = tokenizer, None
        self.start: list[int] = []
        if (path / "tokenizer.json").exists():
            self._own = load_tokenizer_json(path / "tokenizer.json")
            self._own.encode_special_tokens = True
            self.start = self._own.encode("").ids
        if not self.start and (path / MANIFEST).exists():
            self.start = [tokenizer.eos_token_id]

    def encode(self, text: str) -> list[int]:
        """Ids of a text with the start in front."""
        if self._own is None:
            ids = self._tokenizer.encode(text)
        else:
            ids = [*self.start, *self._own.encode(text, add_special_tokens=False).ids]
        if not ids:
            raise SlmError(
                f"the prompt is empty, and nothing stands in front of a text for {self.name}: give some text"
            )
        if self.vocab_size and max(ids) >= self.vocab_size:
            raise SlmError(
                f"{self.name}: its tokenizer gives the id {max(ids)}, its embedding has {self.vocab_size} rows: "
                "take the tokenizer that belongs to the model"
            )
        return ids

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
            notes.append(
                f"the prompt has {len(ids):,} tokens, the context of {self.name} is {context:,}: "
                f"its last {keep:,} were read"
            )
            ids = [*self.start, *ids[-keep:]]
        if len(ids) + max_tokens > context:
            notes += said * [
                f"max_tokens {max_tokens:,} was lowered to {context - len(ids):,}: "
                f"the context of {self.name} is {context:,}"
            ]
            max_tokens = context - len(ids)
        return ids, max_tokens, notes

"""What a tokenizer does not keep of a text: decode(encode(text)) should be the text."""

from __future__ import annotations

import json
from collections.abc import Iterator

from mlx_slm.files import load_tokenizer_json
from mlx_slm.text.hub_tokenizer import JSON_FILE
from mlx_slm.text.tokenizer import Tokenizer

PROBES = {
    "a space at the start": " text",
    "several spaces in a row": "one  two   three",
    "line breaks and tabs": "one\n\n\ttwo\r\nthree\n",
    "spaces in front of punctuation": "one , two . it 's",
    "capital letters": "Text in CAPITALS",
    "accents": "café naïve",
    "characters in decomposed form": "cafe\u0301",
    "compatibility characters": "\ufb01 \u00b2 \u2026 \uff21",
    "other scripts and emoji": "漢字 عربي 🎉👩‍👧",
    "the sign \u2581": "one \u2581 two",
    "control characters": "one\x07\x7ftwo",
}


def lost(tokenizer: Tokenizer) -> list[str]:
    """The kinds of text that do not come back, by name."""
    return [kind for kind, text in PROBES.items() if tokenizer.decode(tokenizer.encode([text])[0]) != text]


def why_lost(tokenizer: Tokenizer) -> str:
    """The parts of its tokenizer.json that can change a text, in words."""
    settings = json.loads(load_tokenizer_json(tokenizer.directory / JSON_FILE).to_str())
    parts = [("normalizer", settings["normalizer"]), ("pre-tokenizer", settings["pre_tokenizer"])]
    named = [f"{part} {', '.join(dict.fromkeys(_types(value)))}" for part, value in parts if value]
    return "; ".join([f"model {settings['model']['type']}", *named])


def _types(part: dict) -> Iterator[str]:
    nested = part.get("normalizers") or part.get("pretokenizers")
    if nested:
        for each in nested:
            yield from _types(each)
    else:
        yield part["type"]

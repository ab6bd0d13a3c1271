"""Running an exported model: mlx-lm does it. Imported late, for `import mlx_lm` takes seconds."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_slm.export.prompt import Prompts, not_loaded
from mlx_slm.report import Report
from mlx_slm.text.readers import Reading, decode


def read_prompt(raw: bytes, where: str, report: Report) -> str:
    """The text of a prompt; what is no UTF-8 is replaced, with a warning. Raises SlmError for another encoding."""
    reading = Reading()
    text = decode(raw.removeprefix(codecs.BOM_UTF8), where, reading)
    if reading.replaced:
        report.warn(f"{where}: replaced invalid UTF-8")
    return text


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_tokens: int = 128
    temp: float = 0.7
    """0: the likeliest token each time."""
    top_p: float = 0.95
    seed: int = 0


def stream(path: Path, prompt: str, how: Sampling, report: Report | None = None) -> Iterator:
    """Yield mlx-lm's responses (`text`, `generation_tokens`, `generation_tps`) for a prompt that starts a document.

    What does not fit the model's context is cut, with a warning.
    """
    import mlx.core as mx
    from mlx_lm import load, stream_generate
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(how.seed)
    try:
        model, tokenizer, *_ = load(str(path))
    except Exception as error:
        raise not_loaded(path, error) from error
    prompts = Prompts(path, tokenizer)
    ids, max_tokens, notes = prompts.fit(prompts.encode(prompt), how.max_tokens)
    for note in notes:
        (report or Report()).warn(note)
    sampler = make_sampler(how.temp, how.top_p)
    yield from stream_generate(model, tokenizer, ids, max_tokens=max_tokens, sampler=sampler)

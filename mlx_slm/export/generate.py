"""Running an exported model: mlx-lm does it. Imported late, for `import mlx_lm` takes seconds."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_slm.errors import SlmError
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


def stream(path: Path, prompt: str, how: Sampling) -> Iterator:
    """Yield mlx-lm's responses (`text`, `generation_tokens`, `generation_tps`) for a prompt that starts a document."""
    import mlx.core as mx
    from mlx_lm import load, stream_generate
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(how.seed)
    try:
        model, tokenizer, *_ = load(str(path))
    except Exception as error:  # whatever mlx-lm or transformers do not like about a directory of somebody else's
        reason = " ".join(str(error).split())[:300]
        raise SlmError(f"{path}: mlx-lm cannot load it ({type(error).__name__}: {reason})") from error
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    if tokenizer.eos_token_id is not None:
        ids = [tokenizer.eos_token_id, *ids]
    max_tokens, positions = how.max_tokens, getattr(model.args, "n_positions", None)
    if positions:  # learned positions end there: beyond them a gpt2 reads out of range
        if len(ids) >= positions:
            raise SlmError(f"the prompt has {len(ids)} tokens, the context of {path.name} is {positions}: shorten it")
        max_tokens = min(max_tokens, positions - len(ids))
    sampler = make_sampler(how.temp, how.top_p)
    yield from stream_generate(model, tokenizer, ids, max_tokens=max_tokens, sampler=sampler)


def serve(path: Path, host: str, port: int) -> None:
    """Run mlx-lm's server in this process, so that it has the fast BLAS too."""
    from mlx_lm import server

    sys.argv = ["mlx_lm.server", "--model", str(path), "--host", host, "--port", str(port)]
    server.main()

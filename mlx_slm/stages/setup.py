"""What a pretraining stands on: the model's shape, the horizon in tokens, the generic set and its held-out windows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mlx_slm.config.schema import TrainingConfig
from mlx_slm.errors import SlmError
from mlx_slm.export.start import Pretrained
from mlx_slm.machine import runtime
from mlx_slm.machine.runtime import likely_flops
from mlx_slm.methods.base import Method, Setup
from mlx_slm.methods.requests import Pretraining
from mlx_slm.models.shape import Shape
from mlx_slm.project import Project
from mlx_slm.storage.forms import Count
from mlx_slm.storage.records import fingerprint, read_record, write_record
from mlx_slm.text.hub_tokenizer import open_tokenizer
from mlx_slm.text.prepare import ensure_set, sources_of, text_needed
from mlx_slm.text.store import Store
from mlx_slm.text.tokenizer import Tokenizer
from mlx_slm.text.workspace_tokenizer import adopt_tokenizer
from mlx_slm.training.scoring import validation_windows
from mlx_slm.training.step import measure_speed, rows_that_fit


def make_setup(project: Project, method: Method, request: Pretraining, path: Path) -> Setup:
    """Prepare and measure what was not; raises SlmError for what does not fit together."""
    config, context = project.config, project.config.data.context_length
    origin = Pretrained(request.init_from, context) if request.init_from else None
    shape = origin.shape if origin else Shape.of(method.model(config), config.tokenizer.vocab_size, context)
    if origin:
        project = adopt_tokenizer(project, origin.directory, origin.called)
    config, slowdown = method.configured(project, shape, path, request.fresh)
    project = dataclasses.replace(project, config=config)
    tokens = _horizon_tokens(project, path, shape, slowdown, request.fresh)
    tokenizer, store = _generic_set(project, tokens and tokens * method.pool)
    if origin and tokenizer.vocab_size > shape.vocab_size:
        raise SlmError(
            f"--init-from {request.init_from}: its tokenizer has {tokenizer.vocab_size:,} ids, its embedding "
            f"{shape.vocab_size:,} rows: repair the model first"
        )
    if not origin:
        shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size)
    valid = Store(project.workspace.require_set(config.data.generic, "valid"))
    windows = validation_windows(valid, config.training.eval_tokens, config.data.seed)
    return Setup(project, shape, origin, tokenizer.fingerprint, store, valid, windows, tokens, path)


def _generic_set(project: Project, tokens: int | None) -> tuple[Tokenizer, Store]:
    """(tokenizer, store) of the generic set, prepared where that was not done; raises SlmError for another context.

    A set that is streamed is read until it holds `tokens` tokens.
    """
    workspace, config, report = project.workspace, project.config, project.report
    generic = config.data.generic
    if generic not in workspace.sets():
        report.line(
            f"no {generic!r} set yet: it will come from {', '.join(sources_of(generic, [], workspace, config))}"
        )
    ensure_set(project, generic, text_needed(tokens) if tokens else None)
    tokenizer, store = open_tokenizer(workspace.tokenizer), Store(workspace.data(generic, "train"))
    store.require_tokenizer(tokenizer)
    store.require_context(config.data.context_length)
    return tokenizer, store


def _horizon_tokens(project: Project, path: Path, shape: Shape, slowdown: float, fresh: bool) -> int | None:
    """Tokens of the horizon; None for passes, which need no such number. Hours are measured once, on the model itself,
    and a method takes `slowdown` times as long a token."""
    training, report = project.config.training, project.report
    if training.steps:
        return training.steps * training.batch_rows * shape.context_length
    if training.tokens:
        return training.tokens
    if training.hours is None:
        return None
    file = path.parent / f".{path.name}.horizons.json"
    key = f"{training.hours:g} {fingerprint([shape.to_dict(), slowdown])[:12]}"
    known = read_record(file, dict[str, Count]) if file.exists() and not fresh else {}
    if key in known:
        return known[key]
    report.line(f"measuring this machine's speed to turn {training.hours:g} hours into tokens (about a minute)")
    speed = calibrated_speed(shape, training, 60)
    tokens = int(speed / slowdown * training.hours * 3600)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(file, known | {key: tokens})
    report.line(f"{speed:,.0f} tokens/s: {training.hours:g} hours are {tokens:,} tokens")
    return tokens


def calibrated_speed(shape: Shape, training: TrainingConfig, seconds: float) -> float:
    """Tokens per second of training, measured in about `seconds` on as many rows as memory and time allow."""
    fit, recompute = rows_that_fit(shape, training.batch_rows, training.micro_rows, training.recompute_layers)
    in_ten_seconds = 10 * likely_flops() / (shape.flops_per_token * shape.context_length)
    rows = min(fit, max(len(runtime.lanes()), int(in_ten_seconds)))
    return measure_speed(shape, rows, seconds, recompute)

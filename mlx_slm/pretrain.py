"""Pretraining: a method is a model and a distribution over clusters (PAPER, section 2).

Here: `slm` and `llm`, one transformer on the generic set as it is; `is`, one on the generic set resampled to a domain.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path

import numpy as np

from mlx_slm import runtime
from mlx_slm.clustering.sampler import Sampler, Stream
from mlx_slm.clustering.target import Target, check_target, clusters_for, importance_of, inputs_of
from mlx_slm.config import Config, TokenizerConfig, TrainingConfig
from mlx_slm.errors import Interrupted, SlmError
from mlx_slm.evaluate import validation_loss, validation_windows
from mlx_slm.export import export_run
from mlx_slm.init_from import Pretrained
from mlx_slm.models.transformer import Shape, Transformer, initialise
from mlx_slm.report import Report, duration
from mlx_slm.text.huggingface import open_tokenizer, tokenizer_of
from mlx_slm.text.prepare import ensure_set, sources_of, text_needed
from mlx_slm.text.store import Store
from mlx_slm.training.optimizer import AdamW
from mlx_slm.training.runs import IMPORTANCE, Run, alone_in, open_run
from mlx_slm.training.step import TrainingStep, measure_speed, rows_that_fit
from mlx_slm.training.trainer import Plan, Trainer
from mlx_slm.workspace import MANIFEST, Workspace, fingerprint, read_json, write_json

POOL = 4
"""Importance sampling draws some clusters often, so it gets so many times the text that it trains on."""


def pretrain(
    workspace: Workspace,
    config: Config,
    method: str,
    report: Report,
    name: str | None = None,
    fresh: bool = False,
    target: Target | None = None,
    init_from: Path | None = None,
) -> Run:
    """Train the model of `method` on the generic set and export it to `models/<name>`.

    `target` is for method `is`; `init_from` is a model directory to start from, with its own tokenizer. Prepares and
    clusters what was not. Returns the finished run; raises SlmError, or Interrupted after saving.
    """
    training, generic, context = config.training, config.data.generic, config.data.context_length
    path = workspace.run(name or (f"is-{target.label}" if target else method))
    origin = Pretrained(init_from, context) if init_from else None
    model_config = config.large if method == "llm" else config.model
    shape = origin.shape if origin else Shape.of(model_config, config.tokenizer.vocab_size, context)
    if origin:
        config = config.model_copy(update={"tokenizer": _tokenizer_of(workspace, config, origin)})
    if target:
        check_target(workspace, config, target)
    tokens = _horizon_tokens(path, shape, training, report, fresh)
    tokenizer, store = _generic_set(workspace, config, tokens, POOL if target else 1, report)
    if origin and tokenizer.vocab_size > shape.vocab_size:
        raise SlmError(
            f"--init-from {init_from}: its tokenizer has {tokenizer.vocab_size:,} ids, its embedding "
            f"{shape.vocab_size:,} rows: repair the model first"
        )
    if not origin:
        shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size)
    valid = Store(workspace.require_set(generic, "valid"))
    windows = validation_windows(valid, training.eval_tokens, config.data.seed)
    clusters = clusters_for(workspace, config, target, report) if target else None
    streams = clusters.assigned(generic, "train").streams(store) if clusters else [Stream(store)]
    set_rows = sum(stream.num_rows for stream in streams)
    per_step = training.batch_rows * context
    steps = math.ceil(tokens / per_step) if tokens else training.steps
    if training.passes:
        steps = math.ceil(training.passes * set_rows / training.batch_rows)
    inputs = {
        "method": method,
        "shape": shape.to_dict(),
        "training": training.model_dump(mode="json", exclude={"report_every", "checkpoint_every"}),
        "tokenizer": tokenizer.fingerprint,
        "data": store.fingerprint,
        "valid": fingerprint([valid.fingerprint, windows.tolist()]),
    }
    if origin:
        inputs["init_from"] = origin.fingerprint
    aim = importance_of(workspace, config, target, clusters, streams, steps * training.batch_rows) if target else None
    if aim:
        inputs["importance"] = inputs_of(config, target, clusters, aim)
    sampler = Sampler(streams, aim.distribution if aim else np.ones(1), training.batch_rows, training.seed)

    def announce() -> None:
        if aim:
            report.line(aim.lines)
        _announce(shape, steps * per_step, set_rows * context, report)

    with alone_in(path):
        run = open_run(workspace, path, method, inputs, config, fresh, announce=announce)
        if aim:
            write_json(path / IMPORTANCE, aim.facts | {"distribution": aim.distribution.tolist()})
        if run.finished:
            report.line(f"run {run.name} is finished ({run.record['step']:,} steps); --fresh trains it anew")
        else:
            start = origin.parameters() if origin else initialise(shape, training.seed)
            run.finish(_trainer(run, shape, start, sampler, valid, windows, training, steps, report).run())
        export_run(workspace, run)
    return run


def _generic_set(workspace: Workspace, config: Config, tokens: int | None, pool: int, report: Report) -> tuple:
    """(tokenizer, store) of the generic set, prepared where that was not done; raises SlmError for another context.

    A set that is streamed is read until it holds `pool` times the tokens of the training.
    """
    generic, context = config.data.generic, config.data.context_length
    if generic not in workspace.sets():
        report.line(
            f"no {generic!r} set yet: it will come from {', '.join(sources_of(generic, [], workspace, config))}"
        )
    ensure_set(workspace, generic, config, report, limit=text_needed(pool * tokens) if tokens else None)
    tokenizer, store = open_tokenizer(workspace.tokenizer), Store(workspace.data(generic, "train"))
    store.require_tokenizer(tokenizer)
    if store.context_length != context:
        raise SlmError(
            f"data/{generic} has windows of {store.context_length} tokens, the configuration asks for {context}: "
            f"set data.context_length={store.context_length}, or run `mlx-slm prepare {generic} --fresh`"
        )
    return tokenizer, store


def _tokenizer_of(workspace: Workspace, config: Config, origin: Pretrained) -> TokenizerConfig:
    """The settings that take the tokenizer of a model directory; those recorded where the workspace has it already.

    Raises SlmError if the workspace has another tokenizer.
    """
    known = tokenizer_of(origin.directory)
    if not (workspace.tokenizer / MANIFEST).exists():
        return config.tokenizer.model_copy(update={"path": str(origin.directory.absolute())})
    tokenizer = open_tokenizer(workspace.tokenizer)
    if tokenizer.fingerprint not in known:
        raise SlmError(
            f"--init-from {origin.directory}: it has another tokenizer than this workspace: use a new --workspace, "
            "whose text is then prepared with the model's tokenizer"
        )
    return TokenizerConfig(**tokenizer.manifest["inputs"]["settings"])


def _trainer(
    run: Run, shape: Shape, parameters: dict, sampler, valid: Store, windows, training: TrainingConfig, steps, report
) -> Trainer:
    plan = Plan(
        steps=steps,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        schedule=training.schedule,
        batch_rows=training.batch_rows,
        eval_every=training.eval_every,
        report_every=training.report_every,
        checkpoint_every=training.checkpoint_every,
    )
    model = Transformer(shape, training.checkpoint_layers)
    micro_rows = training.micro_rows or rows_that_fit(shape, training.batch_rows, training.checkpoint_layers)
    start = partial(TrainingStep, model, AdamW.of(training), micro_rows)
    evaluate = validation_loss(model, valid, windows)
    return Trainer(start, parameters, sampler, plan, run.path, evaluate, report, shape.flops_per_token)


def _horizon_tokens(path, shape: Shape, training: TrainingConfig, report: Report, fresh: bool) -> int | None:
    """Tokens of the horizon; None for steps and passes, which need no such number. Hours are measured once."""
    if training.steps:
        return training.steps * training.batch_rows * shape.context_length
    if training.tokens:
        return training.tokens
    if training.passes:
        return None
    file, key = path.parent / f".{path.name}.horizons.json", f"{training.hours:g} {fingerprint(shape.to_dict())[:12]}"
    known = read_json(file) if file.exists() else {}
    if key in known and not fresh:
        return known[key]
    report.line(f"measuring this machine's speed to turn {training.hours:g} hours into tokens (about a minute)")
    fit = training.micro_rows or rows_that_fit(shape, training.batch_rows, training.checkpoint_layers)
    in_ten_seconds = 10 * _likely_flops() / (shape.flops_per_token * shape.context_length)
    rows = min(fit, max(len(runtime.lanes()), int(in_ten_seconds)))
    speed = measure_speed(shape, rows, 60, training.checkpoint_layers)
    tokens = int(speed * training.hours * 3600)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, known | {key: tokens})
    report.line(f"{speed:,.0f} tokens/s: {training.hours:g} hours are {tokens:,} tokens")
    return tokens


def _likely_flops() -> float:
    """FLOP/s that training reaches about, from the measured matrix product: MFU is 0.2 to 0.5 (docs/decisions.md)."""
    return 0.3e9 * runtime.matmul_gflops()


def _announce(shape: Shape, tokens: int, set_tokens: int, report: Report) -> None:
    """Say what is about to happen; ask where it takes over ten minutes."""
    seconds = tokens * shape.flops_per_token / _likely_flops()
    disk = 3 * 3 * 4 * shape.num_parameters
    text = (
        f"{shape.num_parameters:,} parameters ({shape.family}), {tokens:,} tokens, {tokens / set_tokens:.2g} passes; "
        f"about {duration(seconds)} on this machine, {disk / 1e9:.1f} GB of checkpoints"
    )
    report.line(text)
    if seconds > 600 and not report.confirm("start?"):
        raise Interrupted("not started; nothing was lost")

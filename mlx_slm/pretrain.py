"""Pretraining: a method is a model and a distribution over clusters (PAPER, section 2).

Here: `slm` and `llm`, one transformer on the generic set as it is; `is`, one on the generic set resampled to a domain.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from mlx_slm import runtime
from mlx_slm.clustering.clusters import Clusters, ensure_clusters, far_windows
from mlx_slm.clustering.importance import Importance, histogram, importance, read_weights
from mlx_slm.clustering.sampler import Sampler, Stream
from mlx_slm.config import Config, TrainingConfig, format_size
from mlx_slm.errors import Interrupted, SlmError
from mlx_slm.evaluate import Scorer, validation_windows
from mlx_slm.export import export_run
from mlx_slm.models.transformer import Shape, Transformer, initialise
from mlx_slm.report import Report, duration
from mlx_slm.text.prepare import STREAMED_TOKENS, ensure_set, sources_of, text_needed
from mlx_slm.text.store import Store, first_windows
from mlx_slm.text.tokenizer import Tokenizer
from mlx_slm.training.optimizer import AdamW
from mlx_slm.training.runs import Run, alone_in, open_run
from mlx_slm.training.step import measure_speed, rows_that_fit
from mlx_slm.training.trainer import Plan, Trainer
from mlx_slm.workspace import Workspace, fingerprint, read_json, write_json

METHODS = ("slm", "llm", "is")


@dataclasses.dataclass(frozen=True)
class Target:
    """What importance sampling aims at: the first `tokens` tokens of a domain (None: all), or weights from a file."""

    domain: str | None = None
    tokens: int | None = None
    weights: Path | None = None

    @property
    def label(self) -> str:
        if self.weights:
            return self.weights.stem
        return f"{self.domain}-{format_size(self.tokens) if self.tokens else 'all'}"


def pretrain(
    workspace: Workspace,
    config: Config,
    method: str,
    report: Report,
    name: str | None = None,
    fresh: bool = False,
    target: Target | None = None,
) -> Run:
    """Train the model of `method` on the generic set and export it to `models/<name>`.

    `target` is for method `is`. Prepares and clusters what was not. Returns the finished run; raises SlmError, or
    Interrupted after saving.
    """
    training = config.training
    model_config = config.large if method == "llm" else config.model
    path = workspace.run(name or (f"is-{target.label}" if target else method))
    context = config.data.context_length
    shape = Shape.of(model_config, config.tokenizer.vocab_size, context)
    generic = config.data.generic
    if generic not in workspace.sets():
        report.line(
            f"no {generic!r} set yet: it will come from {', '.join(sources_of(generic, [], workspace, config))}"
        )
    tokens = _horizon_tokens(path, shape, training, report, fresh)
    ensure_set(workspace, generic, config, report, limit=text_needed(tokens) if tokens else None)
    tokenizer, store = Tokenizer(workspace.tokenizer), Store(workspace.data(generic, "train"))
    store.require_tokenizer(tokenizer)
    if store.context_length != context:
        raise SlmError(
            f"data/{generic} has windows of {store.context_length} tokens, the configuration asks for {context}: "
            f"set data.context_length={store.context_length}, or run `mlx-slm prepare {generic} --fresh`"
        )
    shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size)
    valid = Store(workspace.require_set(generic, "valid"))
    windows = validation_windows(valid, training.eval_tokens, config.data.seed)
    clusters = prepare_target(workspace, config, target, report) if target else None
    streams = clusters.assigned(generic, "train").streams(store) if clusters else [Stream(store)]
    set_rows = sum(stream.num_rows for stream in streams)
    per_step = training.batch_rows * context
    steps = math.ceil(tokens / per_step) if tokens else training.steps
    if training.passes:
        steps = math.ceil(training.passes * set_rows / training.batch_rows)
    found = None
    if target:
        found = importance_of(workspace, config, target, clusters, streams, steps * training.batch_rows)
    distribution = found.distribution if found else np.ones(1)
    sampler = Sampler(streams, distribution, training.batch_rows, training.seed)
    settings = training.model_dump(mode="json", exclude={"report_every", "checkpoint_every"})
    inputs = {
        "method": method,
        "shape": shape.to_dict(),
        "training": settings,
        "tokenizer": tokenizer.fingerprint,
        "data": store.fingerprint,
        "valid": fingerprint([valid.fingerprint, windows.tolist()]),
    }
    if target:
        inputs["importance"] = _importance_inputs(config, target, clusters, distribution)

    def announce() -> None:
        if found:
            report.line(found.lines)
        _announce(shape, steps * per_step, set_rows * context, report)

    with alone_in(path):
        run = open_run(workspace, path, method, inputs, config, fresh, announce=announce)
        if found:
            write_json(path / "importance.json", found.facts | {"distribution": found.distribution.tolist()})
        if run.finished:
            report.line(f"run {run.name} is finished ({run.record['step']:,} steps); --fresh trains it anew")
        else:
            run.finish(_trainer(run, shape, sampler, valid, windows, training, steps, report).run())
        export_run(workspace, run)
    return run


def prepare_target(workspace: Workspace, config: Config, target: Target, report: Report) -> Clusters:
    """Prepare the domain where that was not done, cluster the generic set, and assign the domain."""
    if target.domain == config.data.generic:
        raise SlmError(f"--domain {target.domain}: that is the generic set; importance sampling aims at another one")
    sets = [target.domain] if target.domain else []
    for domain in sets:
        ensure_set(workspace, domain, config, report, limit=text_needed(target.tokens or STREAMED_TOKENS))
    return ensure_clusters(workspace, config, [config.clusters.k], sets, report)[0]


def importance_of(
    workspace: Workspace, config: Config, target: Target, clusters: Clusters, streams: list[Stream], rows: int
) -> Importance:
    """The distribution that `rows` training rows are drawn from; the domain counts with its first `tokens` tokens."""
    settings, generic = config.clusters, clusters.assigned(config.data.generic, "train")
    if target.weights:
        counts, names = read_weights(target.weights, clusters.k), {"weights": str(target.weights)}
    else:
        store, assigned = Store(workspace.data(target.domain, "train")), clusters.assigned(target.domain, "train")
        windows = first_windows(store, target.tokens, config.data.seed)
        counts = histogram(assigned.clusters[:][windows], store.windows[:]["length"][windows], clusters.k)
        names = {"domain": target.domain, "far": far_windows(assigned, generic)}
    return importance(
        counts,
        generic.tokens,
        np.array([stream.num_rows for stream in streams]),
        rows,
        settings.smoothing,
        settings.generic_fraction,
        settings.max_passes,
        names,
    )


def _importance_inputs(config: Config, target: Target, clusters: Clusters, distribution: np.ndarray) -> dict:
    knobs = ("k", "smoothing", "generic_fraction", "max_passes")
    return {
        "domain": target.domain,
        "tokens": target.tokens,
        **{name: getattr(config.clusters, name) for name in knobs},
        "clusters": clusters.fingerprint,
        "distribution": fingerprint(distribution.tolist()),
    }


def _trainer(
    run: Run, shape: Shape, sampler, valid: Store, windows, training: TrainingConfig, steps: int, report
) -> Trainer:
    plan = Plan(
        steps=steps,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        schedule=training.schedule,
        batch_rows=training.batch_rows,
        micro_rows=training.micro_rows or rows_that_fit(shape, training.batch_rows, training.checkpoint_layers),
        eval_every=training.eval_every,
        report_every=training.report_every,
        checkpoint_every=training.checkpoint_every,
        optimizer=AdamW.of(training),
    )
    model = Transformer(shape, training.checkpoint_layers)
    scorer = Scorer(model)
    return Trainer(
        model,
        initialise(shape, training.seed),
        sampler,
        plan,
        run.path,
        lambda: scorer(valid, windows).nll,
        report,
    )


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

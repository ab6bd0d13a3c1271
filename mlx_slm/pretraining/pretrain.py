"""Pretraining: method -> job (`methods`) -> trainer -> model (PAPER, section 2)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from mlx_slm.clustering.target import Target, check_target
from mlx_slm.config.schema import Config, ProjectionConfig, TokenizerConfig, TrainingConfig
from mlx_slm.errors import Interrupted, SlmError
from mlx_slm.export.model import export_run
from mlx_slm.export.start import Pretrained
from mlx_slm.fields import format_size
from mlx_slm.machine import runtime
from mlx_slm.methods.jobs import (
    Ground,
    Job,
    check_method,
    expert_jobs,
    experts_inputs,
    generic_clusters,
    generic_job,
    network_job,
    sampled_job,
)
from mlx_slm.models.projected import ProjectedShape
from mlx_slm.models.shape import Shape
from mlx_slm.report import Report, duration
from mlx_slm.storage.artifacts import MANIFEST
from mlx_slm.storage.forms import Count
from mlx_slm.storage.locks import in_use
from mlx_slm.storage.records import fingerprint, read_record, write_record
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.hub_tokenizer import open_tokenizer, tokenizer_of
from mlx_slm.text.prepare import ensure_set, sources_of, text_needed
from mlx_slm.text.store import Store
from mlx_slm.training.projected_step import resolved
from mlx_slm.training.runs import RECORD, Run, alone_in, milestone_step, open_expert, open_run, read_run
from mlx_slm.training.schedule import Plan
from mlx_slm.training.scoring import validation_windows
from mlx_slm.training.step import measure_speed, rows_that_fit
from mlx_slm.training.trainer import Trainer

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
    experts: list[int] | None = None,
) -> Run:
    """Train the model of `method` on the generic set; a single small or large model is exported to `models/<name>`.

    `target` is for method `is`; `init_from` is a model directory to start from, with its own tokenizer; `experts` are
    those of method `mix` to train now (None: all). Prepares and clusters what was not. Returns the run; raises
    SlmError, or Interrupted after saving.
    """
    path = workspace.run(name or (f"is-{target.label}" if target else method))
    if target:
        check_target(workspace, config, target)
    check_method(config, method, init_from, experts)
    ground = _ground(workspace, config, method, path, fresh, init_from, POOL if target else 1, report)
    if method == "mix":
        return _pretrain_mixture(ground, path, fresh, experts, report)
    if method == "pn":
        job = network_job(ground, path, report)
    else:
        job = sampled_job(ground, path, target, report) if target else generic_job(ground, path, method)
    return _work(ground, job, fresh, report, export=method != "pn")


def _pretrain_mixture(ground: Ground, path: Path, fresh: bool, experts: list[int] | None, report: Report) -> Run:
    """SLM-mix: expert by expert; the run itself holds what they have in common and is finished when all are."""
    k = ground.config.mixture.k
    clusters = generic_clusters(ground, k, report)
    inputs = experts_inputs(ground, "mix", clusters) | {"mixture": ground.config.mixture.model_dump(mode="json")}
    possible = [i for i in range(k) if inputs["generic"][i]]
    wanted = possible if experts is None else experts
    empty = [number for number in wanted if number not in possible]
    if empty:
        raise SlmError(f"--experts {empty[0]}: cluster {empty[0]} of the generic set is empty; it has no expert")
    jobs = expert_jobs(ground, path, clusters, inputs, wanted)
    again = fresh and experts is None
    remedy = "start the whole mixture anew with --fresh and without --experts" if fresh else "start anew with --fresh"
    with alone_in(path):
        known = path / "run.json"
        old = Run(path, read_run(path)) if known.exists() and not fresh else None
        left = [job for number, job in jobs.items() if number not in (_finished_experts(old, possible) if old else {})]
        announce = lambda: _announce(left, ground.config.training, report)  # noqa: E731
        run = open_run(ground.workspace, path, "mix", inputs, ground.config, again, announce=announce, remedy=remedy)
        if fresh:
            run.record["started"] = time.time()
        try:
            for number, job in jobs.items():
                report.line(f"expert {number} of 0 to {k - 1}: cluster {number}, {inputs['generic'][number]:,} tokens")
                _work(ground, job, fresh, report, lambda: None)
        finally:
            _record_experts(run, possible)
    return run


def _finished_experts(run: Run, possible: list[int]) -> dict[int, dict]:
    """Records of the experts of a mixture that are finished."""
    found = {number: open_expert(run, number) for number in possible}
    return {number: one.record for number, one in found.items() if one and one.finished}


def _record_experts(run: Run, possible: list[int]) -> None:
    done = _finished_experts(run, possible)
    run.record.update(
        status="finished" if len(done) == len(possible) else "running",
        experts={number: record["valid_nll"] for number, record in done.items()},
        **{key: sum(record[key] for record in done.values()) for key in ("step", "tokens", "skipped_steps", "flops")},
        seconds=round(sum(record["seconds"] for record in done.values()), 2),
        device=runtime.device_name(),
    )
    run.save()


def _work(
    ground: Ground,
    job: Job,
    fresh: bool,
    report: Report,
    announce: Callable[[], None] | None = None,
    export: bool = False,
) -> Run:
    """Do a job, or go on with it; returns the finished run. `announce`: what to say before it begins; `export`: write
    its model too."""
    training = ground.config.training

    def say() -> None:
        if job.lines:
            report.line(job.lines)
        _announce([job], training, report)

    with alone_in(job.path):
        method = job.inputs["method"]
        run = open_run(ground.workspace, job.path, method, job.inputs, ground.config, fresh, announce=announce or say)
        for file, value in job.files.items():
            write_record(job.path / file, value)
        if run.finished:
            report.line(f"run {run.name} is finished ({run.record['step']:,} steps); --fresh trains it anew")
        else:
            with in_use(ground.workspace, ground.config.data.generic):
                trainer = _trainer(job, training, ground.shape.context_length, report)
                run.finish(trainer.run(), trainer.flops)
        if export:
            export_run(ground.workspace, run)
    return run


def _trainer(job: Job, training: TrainingConfig, context_length: int, report: Report) -> Trainer:
    milestones = tuple(milestone_step(tokens, training.batch_rows, context_length) for tokens in training.milestones)
    beyond = [tokens for tokens, step in zip(training.milestones, milestones, strict=True) if step > job.steps]
    if beyond:
        report.warn(f"training.milestones: {format_size(beyond[0])} tokens are beyond the horizon of this training")
    plan = Plan(
        steps=job.steps,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        schedule=training.schedule,
        batch_rows=training.batch_rows,
        eval_every=training.eval_every,
        report_every=training.report_every,
        checkpoint_every=training.checkpoint_every,
        checkpoint_seconds=60 * training.checkpoint_minutes,
        milestones=milestones,
    )
    return Trainer(job.step, job.parameters(), job.sampler, plan, job.path, job.evaluate, report, job.flops_per_token)


def _ground(
    workspace: Workspace,
    config: Config,
    method: str,
    path: Path,
    fresh: bool,
    init_from: Path | None,
    pool: int,
    report: Report,
) -> Ground:
    training, context = config.training, config.data.context_length
    origin = Pretrained(init_from, context) if init_from else None
    model_config = config.large if method == "llm" else config.model
    shape = origin.shape if origin else Shape.of(model_config, config.tokenizer.vocab_size, context)
    if origin:
        config = config.model_copy(update={"tokenizer": _tokenizer_of(workspace, config, origin)})
    slowdown, projection = 1.0, config.projection
    if method == "pn":
        projected = ProjectedShape.of(projection, shape)
        projection = resolved(_as_begun(path, projection, training, fresh), training, projected)
        per_group = training.batch_rows * context / projection.clusters_per_step
        slowdown = projected.flops_per_token(per_group) / shape.flops_per_token
    tokens = _horizon_tokens(path, shape, training, slowdown, report, fresh)
    tokenizer, store = _generic_set(workspace, config, tokens, pool, report)
    if origin and tokenizer.vocab_size > shape.vocab_size:
        raise SlmError(
            f"--init-from {init_from}: its tokenizer has {tokenizer.vocab_size:,} ids, its embedding "
            f"{shape.vocab_size:,} rows: repair the model first"
        )
    if not origin:
        shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size)
    valid = Store(workspace.require_set(config.data.generic, "valid"))
    windows = validation_windows(valid, training.eval_tokens, config.data.seed)
    config = config.model_copy(update={"projection": projection})
    return Ground(workspace, config, shape, origin, tokenizer.fingerprint, store, valid, windows, tokens)


def _as_begun(path: Path, projection: ProjectionConfig, training: TrainingConfig, fresh: bool) -> ProjectionConfig:
    """The section with the clusters of a step that the run began with, perhaps by the memory of another machine."""
    if projection.clusters_per_step or fresh or not (path / RECORD).exists():
        return projection
    inputs = read_run(path)["inputs"]
    if "projection" not in inputs or inputs["training"]["batch_rows"] != training.batch_rows:
        return projection  # of other settings, for which the run is refused later
    return projection.model_copy(update={"clusters_per_step": inputs["projection"]["clusters_per_step"]})


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


def _horizon_tokens(
    path: Path, shape: Shape, training: TrainingConfig, slowdown: float, report: Report, fresh: bool
) -> int | None:
    """Tokens of the horizon; None for passes, which need no such number. Hours are measured once, on the small model,
    and a method takes `slowdown` times as long a token."""
    if training.steps:
        return training.steps * training.batch_rows * shape.context_length
    if training.tokens:
        return training.tokens
    if training.passes:
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
    """Tokens per second of training, measured in about so many seconds on as many rows as memory and time allow."""
    fit, again = rows_that_fit(shape, training.batch_rows, training.micro_rows, training.checkpoint_layers)
    in_ten_seconds = 10 * likely_flops() / (shape.flops_per_token * shape.context_length)
    rows = min(fit, max(len(runtime.lanes()), int(in_ten_seconds)))
    return measure_speed(shape, rows, seconds, again)


def likely_flops() -> float:
    """FLOP/s that training reaches about, from the measured matrix product: MFU is 0.2 to 0.6 (docs/decisions.md)."""
    return 0.3e9 * runtime.matmul_gflops()


def _announce(jobs: list[Job], training: TrainingConfig, report: Report) -> None:
    """Say what is about to happen; ask where it takes over ten minutes."""
    if not jobs:
        return
    rows = [job.steps * training.batch_rows for job in jobs]
    tokens = sum(rows) * jobs[0].sampler.row_length
    seconds = tokens * jobs[0].flops_per_token / likely_flops()
    passes = sum(rows) / sum(job.sampler.num_rows for job in jobs)
    disk = len(jobs) * 3 * 3 * 4 * jobs[0].num_parameters
    several = f"{len(jobs)} experts, each of " if len(jobs) > 1 else ""
    report.line(
        f"{several}{jobs[0].num_parameters:,} parameters ({jobs[0].inputs['shape']['family']}), {tokens:,} tokens, "
        f"{passes:.2g} passes; about {duration(seconds)} on this machine, {disk / 1e9:.1f} GB of checkpoints"
    )
    if seconds > 600 and not report.confirm("start?"):
        raise Interrupted("not started; nothing was lost")

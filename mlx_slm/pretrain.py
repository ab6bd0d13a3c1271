"""Pretraining: method -> job (`methods`) -> trainer -> model (PAPER, section 2)."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from mlx_slm import runtime
from mlx_slm.clustering.target import Target, check_target
from mlx_slm.config import Config, TokenizerConfig, TrainingConfig
from mlx_slm.errors import Interrupted, SlmError
from mlx_slm.export import export_run
from mlx_slm.init_from import Pretrained
from mlx_slm.methods import (
    Ground,
    Job,
    expert_job,
    experts_inputs,
    generic_clusters,
    generic_job,
    network_job,
    sampled_job,
)
from mlx_slm.models.projected import ProjectedShape
from mlx_slm.models.transformer import Shape
from mlx_slm.report import Report, duration
from mlx_slm.scoring import validation_windows
from mlx_slm.text.huggingface import open_tokenizer, tokenizer_of
from mlx_slm.text.prepare import ensure_set, sources_of, text_needed
from mlx_slm.text.store import Store
from mlx_slm.training.runs import Run, alone_in, milestone_step, open_expert, open_run
from mlx_slm.training.step import measure_speed, rows_that_fit
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
    ground = _ground(workspace, config, method, path, fresh, init_from, POOL if target else 1, report)
    if method == "mix":
        return _pretrain_mixture(ground, path, fresh, experts, report)
    if method == "pn":
        job = network_job(ground, path, report)
    else:
        job = sampled_job(ground, path, target, report) if target else generic_job(ground, path, method)
    run = _work(ground, job, fresh, report)
    if method != "pn":
        export_run(workspace, run)
    return run


def _pretrain_mixture(ground: Ground, path: Path, fresh: bool, experts: list[int] | None, report: Report) -> Run:
    """SLM-mix: expert by expert; the run itself holds what they have in common and is finished when all are."""
    k = ground.config.mixture.k
    beyond = [i for i in experts or [] if i >= k]
    if beyond:
        raise SlmError(f"--experts {beyond[0]}: the mixture has the experts 0 to {k - 1} (mixture.k)")
    clusters = generic_clusters(ground, k, report)
    inputs = experts_inputs(ground, "mix", clusters) | {"mixture": ground.config.mixture.model_dump(mode="json")}
    trained = [i for i in range(k) if inputs["generic"][i]]
    with alone_in(path):
        run = open_run(ground.workspace, path, "mix", inputs, ground.config, fresh and experts is None)
    for number in trained if experts is None else experts:
        if number not in trained:
            raise SlmError(f"--experts {number}: cluster {number} of the generic set is empty; it has no expert")
        report.line(f"expert {number} of 0 to {k - 1}: cluster {number}, {inputs['generic'][number]:,} tokens")
        _work(ground, expert_job(ground, path, clusters, inputs, number), fresh, report)
        done = {i: found.record for i in trained if (found := open_expert(run, i)) and found.finished}
        run.record.update(
            status="finished" if len(done) == len(trained) else "running",
            experts={i: record["valid_nll"] for i, record in done.items()},
            step=sum(record["step"] for record in done.values()),
            tokens=sum(record["tokens"] for record in done.values()),
            seconds=round(sum(record["seconds"] for record in done.values()), 2),
            device=runtime.device_name(),
        )
        if fresh:
            run.record["started"] = time.time()
        run.save()
    return run


def _work(ground: Ground, job: Job, fresh: bool, report: Report) -> Run:
    """Do a job, or go on with it; returns the finished run."""
    training = ground.config.training

    def announce() -> None:
        if job.lines:
            report.line(job.lines)
        _announce(job, training, report)

    with alone_in(job.path):
        run = open_run(
            ground.workspace, job.path, job.inputs["method"], job.inputs, ground.config, fresh, announce=announce
        )
        for file, value in job.files.items():
            write_json(job.path / file, value)
        if run.finished:
            report.line(f"run {run.name} is finished ({run.record['step']:,} steps); --fresh trains it anew")
            return run
        plan = Plan(
            steps=job.steps,
            learning_rate=training.learning_rate,
            warmup_steps=training.warmup_steps,
            schedule=training.schedule,
            batch_rows=training.batch_rows,
            eval_every=training.eval_every,
            report_every=training.report_every,
            checkpoint_every=training.checkpoint_every,
            milestones=tuple(
                milestone_step(tokens, training.batch_rows, ground.shape.context_length)
                for tokens in training.milestones
            ),
        )
        trainer = Trainer(
            job.step, job.parameters(), job.sampler, plan, job.path, job.evaluate, report, job.flops_per_token
        )
        run.finish(trainer.run())
    return run


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
    slowdown = 1.0
    if method == "pn":
        per_group = training.batch_rows * context / config.projection.clusters_per_step
        slowdown = ProjectedShape.of(config.projection, shape).flops_per_token(per_group) / shape.flops_per_token
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
    return Ground(workspace, config, shape, origin, tokenizer.fingerprint, store, valid, windows, tokens)


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
    file, key = (
        path.parent / f".{path.name}.horizons.json",
        f"{training.hours:g} {fingerprint([shape.to_dict(), slowdown])[:12]}",
    )
    known = read_json(file) if file.exists() else {}
    if key in known and not fresh:
        return known[key]
    report.line(f"measuring this machine's speed to turn {training.hours:g} hours into tokens (about a minute)")
    fit = training.micro_rows or rows_that_fit(shape, training.batch_rows, training.checkpoint_layers)
    in_ten_seconds = 10 * _likely_flops() / (shape.flops_per_token * shape.context_length)
    rows = min(fit, max(len(runtime.lanes()), int(in_ten_seconds)))
    speed = measure_speed(shape, rows, 60, training.checkpoint_layers)
    tokens = int(speed / slowdown * training.hours * 3600)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, known | {key: tokens})
    report.line(f"{speed:,.0f} tokens/s: {training.hours:g} hours are {tokens:,} tokens")
    return tokens


def _likely_flops() -> float:
    """FLOP/s that training reaches about, from the measured matrix product: MFU is 0.2 to 0.5 (docs/decisions.md)."""
    return 0.3e9 * runtime.matmul_gflops()


def _announce(job: Job, training: TrainingConfig, report: Report) -> None:
    """Say what is about to happen; ask where it takes over ten minutes."""
    tokens = job.steps * training.batch_rows * job.sampler.row_length
    seconds = tokens * job.flops_per_token / _likely_flops()
    passes = job.steps * training.batch_rows / job.sampler.num_rows
    disk = 3 * 3 * 4 * job.num_parameters
    report.line(
        f"{job.num_parameters:,} parameters ({job.inputs['shape']['family']}), {tokens:,} tokens, {passes:.2g} passes; "
        f"about {duration(seconds)} on this machine, {disk / 1e9:.1f} GB of checkpoints"
    )
    if seconds > 600 and not report.confirm("start?"):
        raise Interrupted("not started; nothing was lost")

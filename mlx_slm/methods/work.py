"""A pretraining as a job, and doing it: say what is about to happen, train, record, export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_slm.config.schema import TrainingConfig
from mlx_slm.export.model import export_run
from mlx_slm.fields import format_size
from mlx_slm.machine.ranks import ranks
from mlx_slm.machine.runtime import likely_flops
from mlx_slm.models.transformer import Transformer
from mlx_slm.project import Project
from mlx_slm.report import Report, duration, require_agreement
from mlx_slm.storage.locks import in_use
from mlx_slm.storage.records import write_record
from mlx_slm.text.rows import Sampler, Stream
from mlx_slm.training import checkpoint
from mlx_slm.training.optimizer import AdamW
from mlx_slm.training.runs import Run, RunRequest, alone_in, branch_path, milestone_step, open_together
from mlx_slm.training.schedule import Schedule
from mlx_slm.training.scoring import validation_loss
from mlx_slm.training.step import TrainingStep, rows_that_fit
from mlx_slm.training.trainer import Trainer, Training

if TYPE_CHECKING:
    from mlx_slm.methods.base import Setup


@dataclass(frozen=True)
class TrainingJob:
    """One training: what it is, its rows, its start, its step and its score."""

    path: Path
    inputs: dict
    parameters: Callable[[], dict]
    step: Callable
    """(parameters, moments) -> the step that moves them."""
    sampler: Sampler
    steps: int
    evaluate: Callable[[dict], float]
    num_parameters: int
    flops_per_token: float
    lines: str = ""
    """What the user should read before it starts."""
    files: dict = field(default_factory=dict)
    """JSON to lie in the run, by name."""
    reads: tuple[str, ...] = ()
    """Sets of text beside the generic one that its rows are of."""
    published: dict | None = None
    """`Pretrained.facts` of the model that it begins with."""


def plain_job(
    setup: Setup, inputs: dict, streams: list[Stream], distribution: np.ndarray, **changes: Any
) -> TrainingJob:
    """One transformer on rows that are drawn from a distribution over streams, and from those of `later` phases;
    `changes` are other fields of the job.

    Without `steps` among them it trains on the horizon of the setup.
    """
    shape, training = setup.shape, setup.project.config.training
    micro_rows, recompute = rows_that_fit(shape, training.batch_rows, training.micro_rows, training.recompute_layers)
    model = Transformer(shape, recompute)
    later = changes.pop("later", ())
    job = TrainingJob(
        path=setup.path,
        inputs=inputs,
        parameters=setup.start,
        step=partial(TrainingStep, model, AdamW.of(training), micro_rows),
        sampler=Sampler(streams, distribution, training.batch_rows, training.seed, later=later),
        steps=changes.pop("steps", None) or setup.steps(sum(stream.num_rows for stream in streams), setup.tokens),
        evaluate=validation_loss(model, setup.valid, setup.windows),
        num_parameters=shape.num_parameters,
        flops_per_token=shape.flops_per_token,
        published=setup.published,
    )
    return replace(job, **changes)


def work(
    project: Project, job: TrainingJob, fresh: bool, announce: Callable[[], None] | None = None, export: bool = False
) -> Run:
    """Do a job, or go on with it; returns the finished run. `announce`: what to say before it begins; `export`: write
    its model too."""
    config, report = project.config, project.report

    def say() -> None:
        if job.lines:
            report.line(job.lines)
        announce_jobs([job], config.training, report)

    with alone_in(job.path):
        asked = RunRequest(job.path, job.inputs["method"], job.inputs, config, fresh, published=job.published)
        run = open_together(project.workspace, asked, announce or say)
        if ranks().is_first:
            for file, value in job.files.items():
                write_record(job.path / file, value)
        if run.finished:
            report.line(run.already_finished)
        with in_use(project.workspace, config.data.generic, *job.reads):
            if not run.finished:
                _train(job, config.training, report, run)
            if config.training.cooldown:
                for tokens, step in milestones(job, config.training):
                    _finish_milestone(project, job, run, tokens, step)
        if export and ranks().is_first:
            export_run(project.workspace, run, report)
    return run


def _train(job: TrainingJob, training: TrainingConfig, report: Report, run: Run) -> None:
    """Train a run to its end, and record what came out."""
    beyond = [tokens for tokens, step in _steps_at(job, training) if step > job.steps]
    if beyond:
        report.warn(f"training.milestones: {format_size(beyond[0])} tokens are beyond the horizon of this training")
    trainer = _trainer(job, training, report)
    run.finish(trainer.run(), trainer.flops)


def milestones(job: TrainingJob, training: TrainingConfig) -> list[tuple[int, int]]:
    """(tokens, step) of each milestone that comes before the end of a training."""
    return [(tokens, step) for tokens, step in _steps_at(job, training) if step < job.steps]


def _steps_at(job: TrainingJob, training: TrainingConfig) -> list[tuple[int, int]]:
    length = job.sampler.row_length
    return [(tokens, milestone_step(tokens, training.batch_rows, length)) for tokens in training.milestones]


def _finish_milestone(project: Project, job: TrainingJob, run: Run, tokens: int, step: int) -> None:
    """Let the rate fall to zero by a milestone, from the checkpoint of the run before it, where that was not done."""
    config, report = project.config, project.report
    path, falls_from = branch_path(run.path, step), step - cooldown_steps(config.training, step)

    def begin() -> bool:
        if run.kept_in(step) == path:
            return False
        if falls_from not in checkpoint.checkpoint_steps(run.path):
            report.warn(
                f"run {run.name} keeps no checkpoint at step {falls_from:,}, where the rate of its milestone of "
                f"{format_size(tokens)} begins to fall: only --fresh brings that milestone"
            )
            return False
        report.line(f"the milestone of {format_size(tokens)}: its rate falls from step {falls_from:,} to {step:,}")
        if not checkpoint.checkpoint_steps(path):
            checkpoint.adopt(run.path, falls_from, path)
        return True

    if not ranks().by_first(begin):
        return
    shorter = replace(job, path=path, steps=step, sampler=job.sampler.changing_at(falls_from))
    _trainer(shorter, config.training, report).run()


def _trainer(job: TrainingJob, training: TrainingConfig, report: Report) -> Trainer:
    at = [step - cooldown_steps(training, step) for _, step in milestones(job, training)]
    schedule = Schedule(
        steps=job.steps,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        after_warmup=training.schedule,
        cooldown_steps=cooldown_steps(training, job.steps),
        batch_rows=training.batch_rows,
        eval_every=training.eval_every,
        report_every=training.report_every,
        checkpoint_every=training.checkpoint_every,
        checkpoint_seconds=60 * training.checkpoint_minutes,
        milestones=tuple(at),
    )
    task = Training(
        job.step, job.sampler, schedule, job.evaluate, job.flops_per_token, job.inputs["shape"]["vocab_size"]
    )
    return Trainer(task, job.parameters(), job.path, report)


def cooldown_steps(training: TrainingConfig, steps: int) -> int:
    """Of a horizon of `steps`, those in which the rate falls; the first is not one of them."""
    return min(round(training.cooldown * steps), steps - 1)


def _all_steps(job: TrainingJob, training: TrainingConfig) -> int:
    """With those in which the rate falls for a milestone."""
    branches = milestones(job, training) if training.cooldown else []
    return job.steps + sum(cooldown_steps(training, step) for _, step in branches)


def announce_jobs(jobs: list[TrainingJob], training: TrainingConfig, report: Report) -> None:
    """Say what is about to happen; ask where it takes over ten minutes."""
    if not jobs:
        return
    rows = [_all_steps(job, training) * training.batch_rows for job in jobs]
    tokens = sum(rows) * jobs[0].sampler.row_length
    seconds = tokens * jobs[0].flops_per_token / likely_flops() / ranks().size
    passes = sum(rows) / sum(job.sampler.num_rows for job in jobs)
    disk = len(jobs) * 3 * 3 * 4 * jobs[0].num_parameters
    where = "this machine" if ranks().size == 1 else f"{ranks().size} ranks such as this one"
    several = f"{len(jobs)} experts, each of " if len(jobs) > 1 else ""
    report.line(
        f"{several}{jobs[0].num_parameters:,} parameters ({jobs[0].inputs['shape']['family']}), {tokens:,} tokens, "
        f"{passes:.2g} passes; about {duration(seconds)} on {where}, {disk / 1e9:.1f} GB of checkpoints"
    )
    require_agreement(report, seconds)

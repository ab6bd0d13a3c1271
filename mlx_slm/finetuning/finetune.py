"""Fine-tuning: a domain's rows, early stopping on its validation loss, the best checkpoint kept (section 3)."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from mlx_slm.config.schema import Config, FinetuningConfig, Recipe
from mlx_slm.experts.experts import FINETUNED, Experts
from mlx_slm.machine.ranks import ranks
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer
from mlx_slm.report import Report, perplexity
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.rows import Sampler
from mlx_slm.text.store import Store
from mlx_slm.training.optimizer import AdamW
from mlx_slm.training.runs import Run, RunRequest, expert_path, open_together
from mlx_slm.training.schedule import Schedule
from mlx_slm.training.scoring import validation_loss
from mlx_slm.training.step import Objective, TrainingStep, rows_that_fit
from mlx_slm.training.trainer import Trainer, Training


@dataclass(frozen=True)
class Finetuning:
    """Everything of a fine-tuning but where it starts."""

    config: Config
    shape: Shape
    sampler: Sampler
    schedule: Schedule
    valid: Store
    valid_windows: np.ndarray
    report: Report
    flops_per_token: float
    objective: Objective = field(default_factory=Objective)
    extra_bytes: int = 0
    """Memory that a step needs beside that of a plain one; negative for what it does not need."""

    def work(self, run: Run, parameters: dict) -> None:
        """Fine-tune in the directory of `run`, and record the outcome."""
        tuning, training = self.config.finetuning, self.config.training
        fit, recompute = rows_that_fit(
            self.shape, tuning.batch_rows, tuning.micro_rows, training.recompute_layers, self.extra_bytes
        )
        model, optimizer = Transformer(self.shape, recompute), AdamW.of(training)
        start = partial(TrainingStep, model, optimizer, fit, objective=self.objective)
        score = validation_loss(model, self.valid, self.valid_windows)
        task = Training(
            lambda p, m: start(parameters=p, moments=m),
            self.sampler,
            self.schedule,
            lambda p: score(self.objective.plain(p)),
            self.flops_per_token,
            self.shape.vocab_size,
        )
        trainer = Trainer(task, parameters, run.path, self.report)
        state = trainer.run()
        run.finish(state, trainer.flops)
        best = perplexity(state.best_nll)
        if state.best_step == 0:
            self.report.warn(
                f"fine-tuning made the model worse than its start, which is kept (validation perplexity {best:.2f}): "
                "lower finetuning.learning_rate, or give more text"
            )
        self.report.line(f"best at step {state.best_step:,}: validation perplexity {best:.2f}")


def finetune_all(workspace: Workspace, run: Run, experts: Experts, job: Finetuning) -> None:
    """Fine-tune every expert in a folder of its own, and let the best become the run; goes on where it stopped.

    Of the others only the records stay until the end, so that disk is needed for two.
    """
    tuned: dict[int, Run] = {}
    for number in experts.trained:
        job.report.line(f"fine-tuning expert {number} of 0 to {experts.k - 1}")
        inputs = run.record["inputs"] | {"expert": number}
        path = expert_path(run.path, number)
        tuned[number] = open_together(
            workspace, RunRequest(path, run.record["method"], inputs, job.config, select="best")
        )
        if not tuned[number].finished:
            job.work(tuned[number], experts.parameters(number))
        scores = {done: one.record["valid_nll"] for done, one in tuned.items()}
        best = min(scores, key=lambda number: scores[number])
        for beaten in set(tuned) - {best} if ranks().is_first else ():
            shutil.rmtree(tuned[beaten].path / "checkpoints", ignore_errors=True)
    records = [one.record for one in tuned.values()]
    cost = {key: round(sum(record[key] for record in records), 2) for key in ("tokens", "seconds", "flops")}
    for part in ("checkpoints", "metrics.jsonl") if ranks().is_first else ():
        if (tuned[best].path / part).exists():
            os.replace(tuned[best].path / part, run.path / part)
    outcome = {key: value for key, value in tuned[best].record.items() if key not in ("inputs", "started")}
    selection = {"select": FINETUNED, "expert": best, "histogram": None, "share": None, "scores": scores, "cost": cost}
    run.record |= outcome | {"selection": selection}
    run.save()
    job.report.line(f"the best is expert {best}: validation perplexity {perplexity(scores[best]):.2f}")


def schedule_of(config: Config, recipe: Recipe, rate: float, per_pass: float, per_evaluation: float) -> Schedule:
    """The schedule of a fine-tuning with `per_pass` steps in a pass over the domain set. An evaluation reads as many
    tokens as `per_evaluation` steps: at the most a quarter of the first try's FLOPs is theirs."""
    finetuning = config.finetuning
    cadence = max(1, round(max(per_pass / finetuning.evaluations_per_pass, per_evaluation)))
    patience = max(finetuning.patience * per_pass, finetuning.warmup_steps)
    return Schedule(
        steps=finetuning.max_steps or recipe.steps,
        learning_rate=rate,
        warmup_steps=finetuning.warmup_steps,
        batch_rows=finetuning.batch_rows,
        eval_every=cadence,
        report_every=cadence,
        checkpoint_every=4 * cadence,
        checkpoint_seconds=60 * config.training.checkpoint_minutes,
        patience=math.ceil(patience / cadence),
        again=finetuning.again,
    )


def choose_recipe(finetuning: FinetuningConfig, tokens: int, scratch: bool) -> Recipe:
    """The paper's recipe for a domain set of this many tokens; from scratch the rate is the pretraining rate."""
    recipes = sorted(finetuning.recipes, key=lambda recipe: recipe.tokens)
    recipe = next((r for r in recipes if tokens <= r.tokens), recipes[-1])
    return recipe.model_copy(update={"rate": 1.0}) if scratch else recipe

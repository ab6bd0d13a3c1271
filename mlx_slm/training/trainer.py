"""The one training loop: rows -> compiled step -> reports, evaluations, checkpoints, a second try, resume.

The loss of a step is the mean over its target tokens, whatever the number of micro-batches. One step is always in
flight: the host reads the numbers of step s while the device works on step s+1.

Of several ranks the first reads and writes checkpoints, and says how it goes; all have its state, and agree on what is
next: to stop, or to save for the time that passed, one step after a rank wishes it.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_slm.errors import Interrupted, SlmError
from mlx_slm.files import Damaged
from mlx_slm.machine import runtime
from mlx_slm.machine.ranks import ranks
from mlx_slm.report import Report, duration, perplexity
from mlx_slm.text.rows import Sampler
from mlx_slm.training import checkpoint
from mlx_slm.training.projected_step import ProjectedStep
from mlx_slm.training.schedule import Schedule, State
from mlx_slm.training.step import TrainingStep

BAD_STEPS = 3


@dataclass(frozen=True)
class Training:
    """What is trained and how: everything but where it begins and where it is kept."""

    start: Callable[[dict, dict | None], TrainingStep | ProjectedStep]
    """(parameters, moments) -> the step that moves them; moments None: new ones."""
    sampler: Sampler
    schedule: Schedule
    evaluate: Callable[[dict], float]
    """parameters -> the validation loss in nats per token."""
    flops_per_token: float
    """Of a step, per position."""
    vocab_size: int
    """Rows of the embedding: an id beyond them is refused, for its look-up would read memory of somebody else."""


class Trainer:
    """Trains in the directory `run`, from `parameters` or from its last checkpoint."""

    def __init__(self, training: Training, parameters: dict, run: Path, report: Report):
        self.sampler, self.schedule, self.evaluate = training.sampler, training.schedule, training.evaluate
        self.flops_per_token, self.vocab_size = training.flops_per_token, training.vocab_size
        self.ranks, schedule = ranks(), training.schedule
        self.run_directory, self.report = run, report if self.ranks.is_first else Report()
        report = self.report
        if schedule.batch_rows < self.ranks.size:
            raise SlmError(
                f"{self.ranks.size} ranks cannot share the {schedule.batch_rows} rows of a step: raise batch_rows, or "
                "start fewer ranks"
            )
        if schedule.warmup_steps > schedule.steps:
            report.warn(
                f"the warm-up of {schedule.warmup_steps:,} steps is longer than the training of {schedule.steps:,}, "
                f"which ends at a rate of {schedule.rate(schedule.steps - 1, State()):.1e}: lower warmup_steps"
            )
        self.state, moments = State(), None
        parameters = self.ranks.tree_from_first(parameters)
        self._start = None if schedule.patience is None else parameters  # what a pretraining starts from is freed
        newest = checkpoint.load_newest(run, report) if self.ranks.is_first else None
        if newest:
            parameters, moments, state = newest
            self.state = State.from_json(state)
            report.line(f"resuming {run.name} at step {self.state.step:,} of {schedule.end(self.state):,}")
            self._check_arithmetic()
            self._check_best()
        self.state = State.from_json(self.ranks.from_first(self.state.to_json()))
        self.state.arithmetic = runtime.arithmetic()
        self.metrics = checkpoint.Metrics(run, self.state.step, report) if self.ranks.is_first else None
        if self.ranks.from_first(newest is not None):
            parameters, moments = self.ranks.tree_from_first(parameters), self.ranks.tree_from_first(moments)
        self.step = training.start(parameters, moments)
        self._pending: tuple | None = None
        self._saved_step, self._saved_at = self.state.step if newest else -1, time.perf_counter()

    def run(self) -> State:
        """Train as planned; raises Interrupted after saving on SIGINT or SIGTERM."""
        schedule, state = self.schedule, self.state
        runtime.configure_device()
        peak = runtime.matmul_gflops() * 1e9 * self.ranks.size
        with (
            stop_requested() as stopping,
            ThreadPoolExecutor(1) as loader,
            self.step.sharing_cores(),
        ):
            if schedule.patience is not None and state.best_step is None:
                self._evaluate()
                if not math.isfinite(state.last_nll):
                    raise SlmError(
                        f"the model that it starts from has a validation loss of {state.last_nll}: its weights are "
                        "damaged; make it, or get it, again"
                    )
                self._save()
            rows = loader.submit(self.sampler.rows, state.step)
            started, first = time.perf_counter(), True
            while state.step < schedule.end(state):
                wishes = self._wishes(stopping)
                tokens, weights, clusters = rows.result()
                if tokens.max() >= self.vocab_size:
                    raise Damaged(
                        f"the text holds the token {tokens.max()}, the model's vocabulary has {self.vocab_size}: "
                        "prepare it again, with the model's tokenizer"
                    )
                rows = loader.submit(self.sampler.rows, state.step + 1)
                total = int(weights.sum())
                in_flight = self.step(tokens, weights, schedule.rate(state.step, state), clusters)
                if first:
                    mx.eval(in_flight)
                    compiled, started = time.perf_counter() - started, time.perf_counter()
                    if compiled > 5:
                        self.report.line(f"compiled the step in {compiled:.0f} s; the next run finds it ready")
                    first = False
                self._collect()
                self._pending = (state.step, total, *in_flight)
                state.step += 1
                state.tokens += total
                reporting, evaluating = schedule.is_due(schedule.report_every, state), schedule.evaluates(state)
                saving = schedule.is_due(schedule.checkpoint_every, state) or state.step in schedule.milestones
                stops, saves = wishes()
                saving = saving or saves
                if reporting or evaluating or saving or stops:
                    self._collect()
                now = time.perf_counter()
                state.seconds += now - started
                state.window["seconds"] += now - started
                started = now
                if reporting:
                    self._report(peak)
                better = self._evaluate() if evaluating else False
                falls = evaluating and self._begin_fall()
                if saving or better or falls or stops:
                    self._save()
                if stops and state.step < schedule.end(state):
                    raise Interrupted(f"stopped at step {state.step:,}; the same command again goes on from there")
                if reporting or evaluating or saving:
                    started = time.perf_counter()
            rows.cancel()
        return state

    def _wishes(self, stopping: threading.Event) -> Callable[[], tuple[bool, bool]]:
        """Whether to stop, and whether to save for the time that passed: of one process when it is asked, of several
        what any of them wished when they were about to begin the step."""

        def own() -> tuple[bool, bool]:
            return stopping.is_set(), time.perf_counter() - self._saved_at >= self.schedule.checkpoint_seconds

        if self.ranks.size == 1:
            return own
        counts = self.ranks.summed(mx.array(own(), mx.int32))
        mx.async_eval(counts)
        return lambda: (bool(counts[0].item()), bool(counts[1].item()))

    @property
    def flops(self) -> float:
        """FLOPs of all steps so far."""
        return self.state.step * self.schedule.batch_rows * self.sampler.row_length * self.flops_per_token

    def _check_arithmetic(self) -> None:
        before, now = self.state.arithmetic, runtime.arithmetic()
        if before and before != now:
            self.report.warn(
                f"trained so far with {before}, now with {now}: the last digits differ from an uninterrupted run's"
            )

    def _check_best(self) -> None:
        """Forget a best checkpoint that cannot be read any more: the best from here on counts."""
        best = self.state.best_step
        if best is not None and best != self.state.step and not checkpoint.is_whole(self.run_directory, best):
            self.report.warn(f"the best checkpoint, step-{best}, is lost; the best from here on counts")
            self.state.best_step, self.state.best_nll, self.state.stale = None, math.inf, 0

    def _begin_fall(self) -> bool:
        """Let the rate fall from here on, or begin again with one that falls, if it is time; returns whether it is."""
        state = self.state
        if not self.schedule.begin_fall(state):
            return False
        if state.second:
            assert isinstance(self.step, TrainingStep) and self._start is not None
            self.step.restart(self._start)
        _, end = state.fall or (0, 0)
        if end > state.step:
            how = "again from the start, with a rate that" if state.second else "from here on the rate"
            self.report.line(f"{how} falls to zero by step {end:,}")
        return True

    def _collect(self) -> None:
        """Read the numbers of the step in flight, if any; raises SlmError after three that were not finite."""
        if self._pending is None:
            return
        step, total, loss, norm, bad = self._pending
        self._pending = None
        count = bad.item()
        if count:
            self.state.skipped += 1
            self.report.warn(f"step {step:,} skipped: its loss is {loss.item():g}, its gradient norm {norm.item():g}")
            if count >= BAD_STEPS:
                rows = self.schedule.batch_rows
                if self.state.skipped == step + 1:
                    raise SlmError(
                        f"no step was finite, of {step + 1}: the weights that it starts from are damaged; make them "
                        "again, and start over with --fresh"
                    )
                raise SlmError(
                    f"{BAD_STEPS} steps in a row were not finite, the last is step {step:,} (rows {step * rows:,} to "
                    f"{(step + 1) * rows - 1:,} of the sampler); the weights are those before them: lower the "
                    "learning rate and start over with --fresh"
                )
            return
        window = self.state.window
        window["loss"] += loss.item()
        window["tokens"] += total
        window["steps"] += 1
        window["norm"] = norm.item()

    def _write(self, record: dict) -> None:
        if self.metrics:
            self.metrics.write(record)

    def _report(self, peak: float) -> None:
        state, schedule, window = self.state, self.schedule, self.state.window
        if not window["tokens"]:
            return
        positions = schedule.batch_rows * self.sampler.row_length * window["steps"]
        speed = positions / window["seconds"]
        achieved = speed * self.flops_per_token
        loss, rate = window["loss"] / window["tokens"], schedule.rate(state.step - 1, state)
        left = (schedule.end(state) - state.step) * window["seconds"] / window["steps"]
        memory = mx.get_peak_memory() / 2**30
        self._write(
            {
                "step": state.step,
                "tokens": state.tokens,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": window["norm"],
                "skipped": state.skipped,
                "tokens_per_second": speed,
                "tflops": achieved / 1e12,
                "mfu": achieved / peak,
                "peak_memory_gb": memory,
                "seconds": state.seconds,
            }
        )
        self.report.line(
            f"step {state.step:>6,}/{schedule.end(state):,}  loss {loss:.4f}  lr {rate:.2e}  {speed:,.0f} tok/s  "
            f"{achieved / 1e12:.3f} TFLOP/s  MFU {achieved / peak:.0%}  {memory:.2f} GB  ETA {duration(left)}"
        )
        state.window = State().window

    def _evaluate(self) -> bool:
        """Evaluate; returns whether it is the best so far."""
        state = self.state
        nll = state.last_nll = self.evaluate(self.step.parameters)
        runtime.release_cache()
        better = nll < state.best_nll
        if better:
            state.best_nll, state.best_step, state.stale = nll, state.step, 0
        else:
            state.stale += 1
        self._write({"step": state.step, "tokens": state.tokens, "valid_nll": nll})
        mark = "best so far" if better else f"{state.stale} since the best"
        self.report.line(
            f"step {state.step:>6,}/{self.schedule.end(state):,}  validation perplexity {perplexity(nll):.2f} ({mark})"
        )
        return better

    def _save(self) -> None:
        if self._saved_step == self.state.step:
            return
        if self.ranks.is_first:
            best = self.state.best_step
            keep = {*self.schedule.milestones, *([] if best is None else [best])}
            checkpoint.save_checkpoint(
                self.run_directory, self.state.step, self.step.parameters, self.step.moments, self.state.to_json(), keep
            )
        self._saved_step, self._saved_at = self.state.step, time.perf_counter()


@contextlib.contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set once; a second SIGINT interrupts at once. Only in the main thread."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {}

    def handle(number, frame):
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

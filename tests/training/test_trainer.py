import gc
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from conftest import rounding
from mlx.utils import tree_flatten, tree_map

from mlx_slm.config.schema import ModelConfig
from mlx_slm.errors import Interrupted, SlmError
from mlx_slm.files import Damaged
from mlx_slm.machine import runtime
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.report import Report
from mlx_slm.storage.records import read_json_lines
from mlx_slm.text.rows import Sampler, Stream
from mlx_slm.text.store import Store
from mlx_slm.training import checkpoint, trainer
from mlx_slm.training.checkpoint import checkpoint_steps, load_checkpoint
from mlx_slm.training.optimizer import AdamW
from mlx_slm.training.schedule import Schedule
from mlx_slm.training.scoring import validation_loss
from mlx_slm.training.step import TrainingStep
from mlx_slm.training.trainer import Trainer, Training

STEPS = 26
EXACT = ("step", "tokens", "loss", "learning_rate", "grad_norm", "skipped", "valid_nll")


def make_trainer(store_directory, run, report=None, **changes) -> Trainer:
    """A run of 26 steps that crosses two passes over its rows, with two micro-batches a step."""
    store = Store(Path(store_directory))
    shape = Shape.of(ModelConfig(family="llama", num_layers=1, dims=32, num_heads=4), 400, store.context_length)
    sampler = Sampler([Stream.of(store, np.arange(75))], np.ones(1), 8, seed=5)
    assert 2 * sampler.num_rows < STEPS * 8
    plan = dict(steps=STEPS, learning_rate=1e-2, warmup_steps=3, batch_rows=8, eval_every=7, report_every=4)
    plan |= dict(checkpoint_every=5, after_warmup="cosine")
    vocab_size = changes.pop("vocab_size", shape.vocab_size)
    model = Transformer(shape)
    run.mkdir(parents=True, exist_ok=True)
    task = Training(
        partial(TrainingStep, model, AdamW(), changes.pop("micro_rows", 4)),
        sampler,
        Schedule(**(plan | changes)),
        validation_loss(model, store, np.arange(40)),
        shape.flops_per_token,
        vocab_size,
    )
    return Trainer(task, initialise(shape, 0), run, report or Report())


def everything(run) -> tuple[dict, list]:
    """All tensors and state of the last checkpoint, and the metrics that do not depend on the clock."""
    parameters, moments, state = load_checkpoint(run, checkpoint_steps(run)[-1])
    state = {k: v for k, v in state.items() if k not in ("seconds", "window")}
    records = [{k: record[k] for k in EXACT if k in record} for record in read_json_lines(run / "metrics.jsonl")]
    return dict(tree_flatten([parameters, moments])) | {"state": state}, records


def assert_same(run, expected):
    (tensors, records), (other, other_records) = everything(run), expected
    assert records == other_records
    assert tensors.pop("state") == other["state"]
    for name, value in tensors.items():
        assert mx.array_equal(value, other[name]), name


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "r"
    make_trainer(prepared.data("generic", "train"), run).run()
    return everything(run)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import mlx_slm
from training.test_trainer import make_trainer
from mlx_slm.storage import workspace
from mlx_slm.training import checkpoint, trainer

kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
point = {point!r}
if point == "while saving":
    real, saves = checkpoint.save_arrays, []
    def save(path, tree, metadata=None):
        saves.append(path)
        real(path, tree, metadata)
        if len(saves) == 5:  # the weights of the third checkpoint are written, its moments are not
            kill()
    checkpoint.save_arrays = save
elif point == "before the rename":
    real, renames = os.rename, []
    def rename(a, b):
        renames.append(b)
        if len(renames) == 3:
            kill()
        real(a, b)
    workspace.os.rename = rename
trainer_ = make_trainer({store!r}, Path({run!r}))
if point == "between checkpoints":
    real, calls = trainer_.sampler.rows, []
    def rows(step):
        calls.append(step)
        if len(calls) == 19:
            kill()
        return real(step)
    trainer_.sampler.rows = rows
trainer_.run()
"""


@pytest.mark.parametrize("point", ["between checkpoints", "while saving", "before the rename"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(point, prepared, tmp_path, uninterrupted, report):
    run, store = tmp_path / "r", str(prepared.data("generic", "train"))
    script = KILLED.format(tests=str(Path(__file__).parents[1]), point=point, store=store, run=str(run))
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert finished.returncode == -signal.SIGKILL, finished.stderr
    done = checkpoint_steps(run)
    assert done and done[-1] < STEPS
    make_trainer(store, run, report).run()
    assert f"resuming r at step {done[-1]} of {STEPS}" in report.lines
    assert_same(run, uninterrupted)


def test_it_saves_by_time_too_and_that_changes_nothing(prepared, tmp_path, uninterrupted, monkeypatch):
    """A minute passes at each look at the clock, of which there are at least two a step; five minutes are the limit."""
    ticks = itertools.count(step=60.0)
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(ticks))
    saved = []
    real = checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda run, step, *a: saved.append(step) or real(run, step, *a))
    run = tmp_path / "r"
    made = make_trainer(prepared.data("generic", "train"), run, checkpoint_every=1000, checkpoint_seconds=300.0)
    real_rows, seen = made.sampler.rows, []

    def rows(step):
        seen.append(step)
        if step == 17:
            raise KeyboardInterrupt
        return real_rows(step)

    made.sampler.rows = rows
    with pytest.raises(KeyboardInterrupt):
        made.run()
    apart = np.diff([0, *saved])
    assert 2 <= apart.max() <= 5 and len(saved) >= 3, saved
    monkeypatch.undo()
    later = make_trainer(prepared.data("generic", "train"), run)
    assert later.state.step == saved[-1] <= 17
    later.run()
    assert_same(run, uninterrupted)


def test_interrupted_saves_and_resumes(prepared, tmp_path, uninterrupted):
    run = tmp_path / "r"
    trainer = make_trainer(prepared.data("generic", "train"), run)
    real = trainer.sampler.rows

    def rows(step):
        if step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step)

    trainer.sampler.rows = rows
    with pytest.raises(Interrupted, match=r"stopped at step 1[2-4]; the same command again goes on"):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    make_trainer(prepared.data("generic", "train"), run).run()
    assert_same(run, uninterrupted)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(prepared, tmp_path, uninterrupted, report):
    run = tmp_path / "r"
    make_trainer(prepared.data("generic", "train"), run).run()
    last = checkpoint_steps(run)[-1]
    path = run / "checkpoints" / f"step-{last}" / "optimizer.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 16
    path.write_bytes(raw)
    make_trainer(prepared.data("generic", "train"), run, report).run()
    assert (
        f"step-{last} cannot be used" in report.warnings[0] and "optimizer.safetensors is damaged" in report.warnings[0]
    )
    assert_same(run, uninterrupted)
    for step in checkpoint_steps(run):
        (run / "checkpoints" / f"step-{step}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(SlmError, match="every checkpoint is damaged .* start over with --fresh"):
        make_trainer(prepared.data("generic", "train"), run)


def test_a_full_disk_loses_no_checkpoint(prepared, tmp_path, uninterrupted, monkeypatch):
    run, store = tmp_path / "r", prepared.data("generic", "train")
    real, count = safetensors.numpy.save_file, itertools.count()

    def save(arrays, path, metadata=None):
        if next(count) == 5:
            Path(path).write_bytes(b"half")
            raise safetensors.SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        real(arrays, path, metadata)

    monkeypatch.setattr(safetensors.numpy, "save_file", save)
    trainer = make_trainer(store, run)
    with pytest.raises(OSError) as error:
        trainer.run()
    assert error.value.errno == 28 and "step-10" in str(error.value.filename)
    assert checkpoint_steps(run) == [5, 7]
    make_trainer(store, run).run()
    assert_same(run, uninterrupted)


def test_the_last_two_and_the_best_are_kept(prepared, tmp_path):
    run = tmp_path / "r"
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0])
    trainer = make_trainer(prepared.data("generic", "train"), run)
    trainer.evaluate = lambda _: next(losses)
    state = trainer.run()
    assert (state.best_step, state.best_nll) == (14, 1.0)
    assert checkpoint_steps(run) == [14, 25, 26]


TWICE = dict(steps=40, after_warmup="constant", eval_every=3, patience=2, again=0.75)
LOSSES = {0: 4.0, 3: 3.0, 6: 1.0, 9: 2.0, 12: 1.5, 14: 3.0, 16: 0.9, 18: 1.2, 20: 1.0, 21: 1.1}


def tried_twice(prepared, run, report=None, **changes) -> Trainer:
    """A fine-tuning whose first try is best after 6 steps and ends after 12; the second one takes 0.75 times 12."""
    made = make_trainer(prepared.data("generic", "train"), run, report, **(TWICE | changes))
    made.evaluate = lambda _: LOSSES[made.state.step]
    return made


def test_a_second_try_begins_at_the_start_and_its_rate_falls_to_zero(prepared, tmp_path, report):
    trainer = tried_twice(prepared, tmp_path / "r", report)
    rates, real, begun = [], trainer.step.__class__.__call__, {}

    class Watched(TrainingStep):
        def __call__(self, tokens, weights, rate, clusters):
            if trainer.state.step in (0, 12):
                begun[trainer.state.step] = dict(tree_flatten([self.parameters, self.moments]))
            rates.append(rate)
            return real(self, tokens, weights, rate, clusters)

    trainer.step.__class__ = Watched
    state = trainer.run()
    assert (state.step, state.fall, state.second, state.best_step, state.best_nll) == (21, (12, 21), True, 16, 0.9)
    assert all(mx.array_equal(begun[12][name], value) for name, value in begun[0].items())
    warm = [1 / 3, 2 / 3, 1]
    assert rates == pytest.approx(
        [0.01 * r for r in (*warm, *[1] * 9)] + [0.01 * (warm[i] if i < 3 else 1) * (9 - i) / 9 for i in range(9)]
    )
    evaluated = [r["step"] for r in read_json_lines(tmp_path / "r" / "metrics.jsonl") if "valid_nll" in r]
    assert (
        evaluated == list(LOSSES) and "again from the start, with a rate that falls to zero by step 21" in report.lines
    )
    assert 16 in checkpoint_steps(tmp_path / "r")


@pytest.mark.parametrize("stop", [2, 10, 12, 15, 20])
def test_a_fine_tuning_that_was_stopped_ends_with_the_same_bits(prepared, tmp_path, stop):
    tried_twice(prepared, tmp_path / "whole").run()
    trainer = tried_twice(prepared, tmp_path / "r")
    real = trainer.sampler.rows

    def rows(step):
        if step == stop:
            raise KeyboardInterrupt
        return real(step)

    trainer.sampler.rows = rows
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    tried_twice(prepared, tmp_path / "r").run()
    assert_same(tmp_path / "r", everything(tmp_path / "whole"))


@pytest.mark.parametrize(("steps", "begins"), [(20, 11), (7, 4), (1, None)])
def test_where_the_horizon_comes_first_the_rate_falls_up_to_it(prepared, tmp_path, steps, begins):
    trainer = tried_twice(prepared, tmp_path / "r", steps=steps, patience=99)
    trainer.evaluate = lambda _: 9.0 - trainer.state.step
    state = trainer.run()
    assert (state.step, state.fall, state.second) == (steps, begins and (begins, steps), False)
    assert state.best_step == steps and (begins is None or trainer.schedule.rate(steps, state) == 0)


def test_a_warm_up_that_never_ends_is_said(prepared, tmp_path, report):
    make_trainer(prepared.data("generic", "train"), tmp_path / "r", report, steps=4, warmup_steps=8)
    assert report.warnings == [
        "the warm-up of 8 steps is longer than the training of 4, which ends at a rate of 5.0e-03: lower warmup_steps"
    ]


def test_a_start_that_nothing_is_better_than_is_kept(prepared, tmp_path):
    trainer = tried_twice(prepared, tmp_path / "r")
    trainer.evaluate = lambda _: 1.0 + trainer.state.step
    state = trainer.run()
    assert (state.step, state.best_step, state.fall) == (10, 0, (6, 10)) and 0 in checkpoint_steps(tmp_path / "r")
    assert tried_twice(prepared, tmp_path / "r").run().step == 10


def poison(trainer, bad: set[int]) -> None:
    """Make the loss of these steps overflow."""

    class Poisoned(TrainingStep):
        def __call__(self, tokens, weights, rate, clusters):
            scale = np.float32(3e38 if trainer.state.step in bad else 1)
            with np.errstate(over="ignore"):
                return super().__call__(tokens, weights * scale, rate)

    trainer.step.__class__ = Poisoned


def test_a_pretraining_frees_what_it_starts_from(prepared, tmp_path, monkeypatch):
    begun, real = [], initialise

    def watched(shape, seed):
        made = real(shape, seed)
        begun.extend(weakref.ref(value) for _, value in tree_flatten(made))
        return made

    monkeypatch.setitem(globals(), "initialise", watched)
    trainer = make_trainer(prepared.data("generic", "train"), tmp_path / "r", steps=3)
    trainer.run()
    gc.collect()
    assert begun and all(value() is None for value in begun)


def test_a_bad_step_is_skipped_and_counted_and_three_stop_the_run(prepared, tmp_path, report):
    trainer = make_trainer(prepared.data("generic", "train"), tmp_path / "one", report)
    poison(trainer, {4, 6})
    state = trainer.run()
    assert state.skipped == 2 and state.step == STEPS and trainer.step.moments["updates"].item() == STEPS - 2
    assert [w.split(":")[0] for w in report.warnings] == ["step 4 skipped", "step 6 skipped"]
    trainer = make_trainer(prepared.data("generic", "train"), tmp_path / "three", report)
    poison(trainer, {3, 9, 10, 11})
    with pytest.raises(SlmError, match=r"3 steps in a row were not finite, the last is step 11 \(rows 88 to 95"):
        trainer.run()
    assert checkpoint_steps(tmp_path / "three")[-1] == 10


@pytest.mark.parametrize("patience", [None, 3])
def test_a_start_that_is_no_model_is_said_to_be_one(prepared, tmp_path, patience):
    trainer = make_trainer(prepared.data("generic", "train"), tmp_path / "r", patience=patience)
    trainer.step.parameters = tree_map(lambda value: value * float("nan"), trainer.step.parameters)
    with pytest.raises(SlmError, match="(no step was finite, of 3: the|loss of nan: its) weights .*are damaged"):
        trainer.run()


def test_rows_and_steps_do_not_depend_on_the_micro_batch(prepared, tmp_path):
    runs = {}
    for micro in (1, 2, 4, 8):
        trainer = make_trainer(prepared.data("generic", "train"), tmp_path / str(micro), micro_rows=micro, steps=6)
        seen = []

        class Recording(TrainingStep):
            def __call__(self, tokens, weights, rate, clusters, seen=seen):
                seen.append(tokens)
                return super().__call__(tokens, weights, rate)

        trainer.step.__class__ = Recording
        trainer.run()
        runs[micro] = np.stack(seen), dict(tree_flatten(trainer.step.parameters))
    for micro in (1, 2, 4):
        assert (runs[micro][0] == runs[8][0]).all()
        for name, value in runs[8][1].items():
            apart = mx.abs(runs[micro][1][name] - value)
            if runtime.on_gpu():  # 6 steps at 1e-2; Adam moves what is all rounding as far as the rest
                assert apart.max() < 0.06 and apart.mean() < 1e-3, (micro, name)
            else:
                assert apart.max() < 2e-4, (micro, name)


def test_the_loss_is_a_mean_over_tokens_not_over_micro_batches(store):
    """Two micro-batches with unequal numbers of targets: the gradient is that of one batch with all of them."""
    shape = Shape.of(ModelConfig(family="llama", num_layers=1, dims=32, num_heads=4), 400, store.context_length)
    stream = Stream(store)
    tokens, weights = (np.stack(x) for x in zip(*(stream.row(i) for i in range(4)), strict=True))
    weights[:2, 5:] = 0
    moved = []
    for micro in (2, 4):
        step = TrainingStep(Transformer(shape), AdamW(), micro, initialise(shape, 0))
        loss, norm, _ = step(tokens, weights, 1e-3)
        moved.append((loss.item(), norm.item()))
    assert np.allclose(moved[0], moved[1], rtol=max(1e-5, rounding()))
    assert moved[0][0] / weights.sum() == pytest.approx(math.log(400), rel=0.05)


def test_a_lost_best_checkpoint_does_not_stop_a_run(prepared, tmp_path, report):
    run, losses = tmp_path / "r", {3: 1.0, 6: 2.0, 9: 2.0, 12: 3.0, 15: 1.5, 18: 2.0, 21: 2.0}

    def train(**changes):
        trainer = make_trainer(prepared.data("generic", "train"), run, report, eval_every=3, **changes)
        trainer.evaluate = lambda _: losses[trainer.state.step]
        return trainer

    with pytest.raises(KeyError):
        del losses[15]
        train().run()
    losses |= {15: 1.5, 24: 2.0, 26: 2.0}
    (run / "checkpoints" / "step-3" / "model.safetensors").write_bytes(b"")
    state = train().run()
    assert "the best checkpoint, step-3, is lost; the best from here on counts" in report.warnings
    assert (state.best_step, state.best_nll) == (15, 1.5)


def test_metrics_have_a_record_for_every_report(uninterrupted):
    _, records = uninterrupted
    assert [r["step"] for r in records if "loss" in r] == [4, 8, 12, 16, 20, 24, 26]
    assert [r["step"] for r in records if "valid_nll" in r] == [7, 14, 21, 26]
    assert records[0]["loss"] > records[-2]["loss"]
    json.dumps(records)


def test_another_blas_on_resume_is_said(prepared, tmp_path, report, monkeypatch):
    store = prepared.data("generic", "train")
    make_trainer(store, tmp_path / "r", steps=10).run()
    monkeypatch.setattr(runtime, "arithmetic", lambda: "another BLAS")
    make_trainer(store, tmp_path / "r", report).run()
    assert sum("now with another BLAS" in line for line in report.warnings) == 1
    make_trainer(store, tmp_path / "r", report, steps=30).run()
    assert len(report.warnings) == 1, "said once"


def test_an_id_beyond_the_embedding_is_never_looked_up(prepared, tmp_path):
    trainer = make_trainer(prepared.data("generic", "train"), tmp_path / "run", vocab_size=300)
    with pytest.raises(Damaged, match=r"holds the token 3\d\d, the model's vocabulary has 300"):
        trainer.run()

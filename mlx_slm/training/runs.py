"""A run: one directory with its configuration, metrics, checkpoints and record (`run.json`).

The same command again resumes an unfinished run and says so for a finished one; another configuration under the same
name is refused.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_slm.config.files import dump_config, load_config
from mlx_slm.config.schema import Config
from mlx_slm.errors import OtherSettings, SlmError
from mlx_slm.files import Damaged
from mlx_slm.machine import runtime
from mlx_slm.machine.ranks import ranks
from mlx_slm.models.shape import Shape
from mlx_slm.storage import formats
from mlx_slm.storage.artifacts import sha256
from mlx_slm.storage.forms import RunForm
from mlx_slm.storage.locks import alone
from mlx_slm.storage.records import count_damaged_lines, read_record, write_record, write_text
from mlx_slm.storage.workspace import Workspace
from mlx_slm.training import checkpoint
from mlx_slm.training.schedule import State

RECORD, CONFIG, IMPORTANCE, METRICS = "run.json", "config.yaml", "importance.json", "metrics.jsonl"
EXPERT = "expert-"
"""A run of several models keeps each in a folder of this name and its number."""
BRANCH = "at-"
"""A run keeps a milestone for which the rate fell in a folder of this name and its step."""


@dataclass
class Run:
    """`record` is run.json: method, inputs (fingerprints and settings), status, and what came out."""

    path: Path
    record: dict
    milestone: int | None = None
    """The step of a checkpoint that was kept, to stand for the run in place of its last."""

    @property
    def name(self) -> str:
        if self.is_handed_over:
            return self.record["name"]
        is_expert = self.path.name.startswith(EXPERT) and (self.path.parent / "run.json").exists()
        return f"{self.path.parent.name}/{self.path.name}" if is_expert else self.path.name

    @property
    def finished(self) -> bool:
        return self.record["status"] == "finished"

    @property
    def shape(self) -> Shape:
        return Shape(**self.record["inputs"]["shape"])

    @property
    def identity(self) -> str:
        """Another one for a run of the same name that was trained again, or differently."""
        return formats.identity_of(self.record)

    @property
    def published(self) -> dict | None:
        """Where the published model lies that this run goes back to, and what its author says of it."""
        return self.record.get("published")

    def finish(self, state: State, flops: float) -> None:
        """Record the outcome and what it cost."""
        self.record.update(
            status="finished",
            step=(checkpoint.checkpoint_steps(self.path) or [state.step])[-1],
            best_step=state.best_step,
            valid_nll=state.best_nll if self.record["select"] == "best" else state.last_nll,
            tokens=state.tokens,
            skipped_steps=state.skipped,
            seconds=round(state.seconds, 2),
            flops=flops,
            device=runtime.device_name(),
        )
        self.save()

    @property
    def already_finished(self) -> str:
        """To say where there is nothing left to do."""
        return f"run {self.name} is finished ({self.record['step']:,} steps); --fresh trains it again"

    def save(self) -> None:
        """Write the record; of several ranks the first does."""
        if ranks().is_first:
            write_record(self.path / RECORD, self.record)

    def importance(self) -> dict:
        """The report of importance sampling, with the distribution that the rows were drawn from."""
        return read_record(self.path / IMPORTANCE)

    def config(self) -> Config:
        """The configuration that this run began with; raises Damaged where the file was changed since."""
        path = self.path / CONFIG
        if sha256(path) != self.record.get("config"):
            raise Damaged(f"{path} was changed after it was written; bring it back, or start over with --fresh")
        return load_config(path)

    @property
    def label(self) -> str:
        """The name, with the step of a milestone."""
        return self.name if self.milestone is None else f"{self.name}-step-{self.milestone}"

    @property
    def is_handed_over(self) -> bool:
        """Whether this run lies in a bundle: it is read only, and its directory may have any name."""
        return "name" in self.record

    @property
    def is_mixture(self) -> bool:
        """Whether this is a hard mixture: a run of several models, each of which is a run."""
        return "mixture" in self.record["inputs"] and not {"expert", "from"} & set(self.record["inputs"])

    @property
    def is_network(self) -> bool:
        """Whether this is a projected network, and not a model that was specialised from one."""
        return "projection" in self.record["inputs"] and "from" not in self.record["inputs"]

    def step_at(self, tokens: int) -> int:
        """The step after which this pretraining has seen `tokens` tokens; KeyError for a run that is none."""
        return milestone_step(tokens, self.record["inputs"]["training"]["batch_rows"], self.shape.context_length)

    def kept_in(self, step: int) -> Path:
        """The directory of the checkpoint of a step: that of a milestone for which the rate fell, or of the run."""
        branch = branch_path(self.path, step)
        return branch if step in checkpoint.checkpoint_steps(branch) else self.path

    def kept_steps(self) -> list[int]:
        """Steps whose weights are at hand, ascending."""
        named = (path.name.removeprefix(BRANCH) for path in self.path.glob(f"{BRANCH}*"))
        branches = [int(step) for step in named if step.isdecimal() and self.kept_in(int(step)) != self.path]
        kept = checkpoint.checkpoint_steps(self.path)
        if self.is_cooled:  # the rate has fallen for its milestones and its end, not for what lies between
            kept = [step for step in kept if self.finished and step == self.record["step"]]
        return sorted({*kept, *branches})

    @property
    def is_cooled(self) -> bool:
        """Whether this is a pretraining whose rate falls in its last part."""
        return bool(self.record["inputs"].get("training", {}).get("cooldown"))

    def weights_step(self) -> int | None:
        """The step whose weights stand for this run: the best of a specialisation, the last of a pretraining, or that
        of the milestone. None for a mixture."""
        if self.is_mixture:
            return None
        if self.milestone is not None:
            return self.milestone
        if self.finished:
            return self.record["best_step" if self.record["select"] == "best" else "step"]
        steps = checkpoint.checkpoint_steps(self.path)
        if not steps:
            raise SlmError(f"run {self.name} has no checkpoint yet: run its command again, it goes on")
        return steps[-1]

    def weights(self) -> dict:
        """Parameters of that step, checked. If they are damaged the run counts as unfinished: its command mends it."""
        step = self.weights_step()
        try:
            assert step is not None, "a mixture has no weights of its own"
            return checkpoint.load_weights(self.kept_in(step), step)
        except SlmError as error:
            what = f"run {self.name}: {error.args[0].split('; ')[0]}; "
            if self.is_handed_over:
                raise SlmError(f"{what}get the bundle again") from error
            if self.milestone is not None:
                raise SlmError(
                    f"{what}only pretraining it again (--fresh, with training.milestones) brings this milestone back"
                ) from error
            if self.finished:
                self.record["status"] = "running"
                self.save()
            raise SlmError(
                f"{what}run the command that made it again: it goes back to the checkpoint before"
            ) from error


def without_path(published: dict | None) -> dict | None:
    """What a record says of a published model, for what leaves this machine."""
    if not published or published["revision"]:
        return published
    return published | {"model": Path(published["model"]).name}


def alone_in(path: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a run; of several ranks the first does. Raises Busy if another process has it."""
    if not ranks().is_first:
        return contextlib.nullcontext()
    busy = f"run {path.name} is being trained by another process: wait, or give --name"
    return alone(path.with_name(f".{path.name}.lock"), busy)


ROWS_KEY = "rows"
REMEDY = "start over with --fresh"


@dataclass(frozen=True)
class RunRequest:
    """A run that is to be there."""

    path: Path
    method: str
    inputs: dict
    """What it is made from: with others under this name, it is another run."""
    config: Config
    fresh: bool = False
    """Throw an earlier run of this name away."""
    select: str = "last"
    """Which checkpoint stands for it: the last or the best."""
    remedy: str = REMEDY
    """What to do where the name belongs to another configuration."""
    published: dict | None = None
    """`Pretrained.facts` of the model that it goes back to."""


def open_run(workspace: Workspace, asked: RunRequest, announce: Callable[[], None] = lambda: None) -> Run:
    """Open a run, new or not; raises SlmError where the name belongs to another configuration.

    `announce` is called before anything is begun or, with `fresh`, removed; it may raise. Call this in `alone_in`.
    """
    path, inputs, fresh = asked.path, asked.inputs, asked.fresh
    record = read_run(path) if (path / RECORD).exists() and not fresh else None
    inputs = inputs | {ROWS_KEY: formats.ROWS}
    before = _made_from(record) if record else inputs
    if before[ROWS_KEY] != inputs[ROWS_KEY]:
        raise SlmError(
            f"run {path.name} was begun with rows in the layout {before[ROWS_KEY]}, and this version lays them out as "
            f"{inputs[ROWS_KEY]}: train it again with --fresh"
        )
    if record and before != inputs:
        changed = sorted(k for k in {*inputs, *before} if before.get(k) != inputs.get(k))
        what = ", ".join(_difference(k, before.get(k), inputs.get(k)) for k in changed)
        raise OtherSettings(
            f"run {path.name} was started with another configuration ({what})",
            f"put it back, give another --name, or {asked.remedy}",
        )
    if not record and not fresh and checkpoint.checkpoint_steps(path):
        raise SlmError(f"run {path.name} has checkpoints but no run.json that says of what: start over with --fresh")
    if not record or record["status"] != "finished":
        announce()
    if record:
        run = Run(path, record)
        if run.published != asked.published:
            run.record["published"] = asked.published
            run.save()
        return run
    if fresh:
        shutil.rmtree(path, ignore_errors=True)
        if path == workspace.run(path.name):
            for made in (workspace.model(path.name), workspace.adapter(path.name)):
                shutil.rmtree(made, ignore_errors=True)
    path.mkdir(parents=True, exist_ok=True)
    write_text(path / CONFIG, dump_config(asked.config))
    record = {"method": asked.method, "inputs": inputs, "status": "running", "select": asked.select}
    record["started"] = time.time()
    if asked.published:
        record["published"] = asked.published
    run = Run(path, record | {"config": sha256(path / CONFIG)})
    run.save()
    return run


def _made_from(record: dict) -> dict:
    return {ROWS_KEY: 1} | record["inputs"]


def is_of(record: dict, inputs: dict) -> bool:
    """Whether a run was made from these inputs."""
    return _made_from(record) == inputs | {ROWS_KEY: formats.ROWS}


def open_together(workspace: Workspace, asked: RunRequest, announce: Callable[[], None] = lambda: None) -> Run:
    """`open_run` by the first of several ranks; the others have its record. Raises SlmError where what they would train
    is not the same on all."""
    together = ranks()
    together.require_same({WORDS.get(key, key): value for key, value in asked.inputs.items()})
    return Run(asked.path, together.by_first(lambda: open_run(workspace, asked, announce).record))


WORDS = {"data": "training text", "valid": "validation text", "from": "model to start from"}
"""What inputs of runs are called beside their keys."""


def read_run(path: Path) -> dict:
    """The record of the run in a directory; raises Damaged for one that was changed."""
    record = read_record(path / RECORD, RunForm)
    return formats.published_apart(record | {"inputs": formats.renamed(record["inputs"])})


def expert_path(run: Path, expert: int) -> Path:
    """Where a run of several models keeps one of them."""
    return run / f"{EXPERT}{expert}"


def branch_path(run: Path, step: int) -> Path:
    """Where a run keeps its milestone at a step, where the rate fell for it."""
    return run / f"{BRANCH}{step}"


def verify_run(path: Path) -> None:
    """Check the record, the configuration and the other files of a run; raises Damaged."""
    run = Run(path, read_run(path))
    run.config()
    if (path / IMPORTANCE).exists():
        run.importance()
    if damaged := count_damaged_lines(path / METRICS):
        raise Damaged(f"{path / METRICS}: {damaged} damaged lines; they are left out")


def open_expert(run: Run, expert: int) -> Run | None:
    """One model of a run of several; None where it was not begun."""
    path = expert_path(run.path, expert)
    return Run(path, read_run(path)) if (path / RECORD).exists() else None


def require_expert(run: Run, expert: int) -> Run:
    """One model of a run of several; raises SlmError where it was not begun."""
    opened = open_expert(run, expert)
    if opened is None:
        raise SlmError(f"run {run.name} has no expert {expert} yet: run its command again, it goes on")
    return opened


def milestone_step(tokens: int, batch_rows: int, context_length: int) -> int:
    """The step after which a pretraining with these settings has seen `tokens` tokens."""
    return -(-tokens // (batch_rows * context_length))


def _difference(key: str, old, new) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        return ", ".join(_difference(f"{key}.{part}", old.get(part), new.get(part)) for part in parts)
    short = all(len(str(value)) < 30 for value in (old, new))
    return f"{key} {old} -> {new}" if short else key

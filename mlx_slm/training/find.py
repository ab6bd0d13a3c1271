"""Runs by the names that a user gives them: RUN, and RUN@TOKENS for a milestone."""

from __future__ import annotations

from mlx_slm.errors import SlmError, nearest
from mlx_slm.fields import parse_size
from mlx_slm.storage.workspace import Workspace
from mlx_slm.training.runs import Run, read_run


def find_run(workspace: Workspace, name: str) -> Run:
    """Return a run by name, or RUN@TOKENS, the run at a milestone; raises SlmError with the runs there are."""
    name, at, tokens = name.partition("@")
    if at:
        return _at(find_run(workspace, name), tokens)
    path = workspace.run(name)
    if not (path / "run.json").exists():
        known = workspace.runs()
        listed = ", ".join(known) or "none; `mlx-slm pretrain` makes the first"
        raise SlmError(f"no run {name!r} in {workspace.root}{nearest(name, known)}; runs: {listed}")
    return Run(path, read_run(path))


def _at(run: Run, tokens: str) -> Run:
    kept = run.kept_steps()
    if run.is_mixture:
        raise SlmError(f"{run.name}@{tokens}: a mixture has no milestones; give the run as {run.name}")
    try:
        step = run.step_at(parse_size(tokens))
    except (ValueError, KeyError) as error:
        raise SlmError(f"{run.name}@{tokens}: write it as RUN@TOKENS of a pretraining run, such as slm@5M") from error
    if step not in kept:
        raise SlmError(
            f"run {run.name} keeps no checkpoint after {tokens} tokens (step {step:,}; it has the steps "
            f"{', '.join(map(str, kept)) or 'none'}): "
            + ("run its command again where it was broken off, or " if run.is_cooled else "")
            + "name it in training.milestones before training"
        )
    return Run(run.path, run.record, step)


def default_run(workspace: Workspace, method: str, option: str = "--from") -> str:
    """The name of the only pretrained run of a method; raises SlmError, which names `option`, if there is a choice."""
    records = {name: find_run(workspace, name).record for name in workspace.runs()}
    pretrained = [name for name, r in records.items() if r["method"] == method and "from" not in r["inputs"]]
    if len(pretrained) > 1 and method not in pretrained:
        raise SlmError(f"several pretrained runs of method {method}: {', '.join(pretrained)}; name one with {option}")
    return pretrained[0] if len(pretrained) == 1 else method

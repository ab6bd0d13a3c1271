"""Ranks that share no files: what one has and another lacks is sent."""

import shutil

import numpy as np
import pytest
from conftest import copy_of, publish, write_jsonl
from together import MAIN, command, launch, losses, with_options

from mlx_slm.machine.trees import flat
from mlx_slm.text.store import Store
from mlx_slm.training.find import find_run
from mlx_slm.training.runs import open_expert


@pytest.fixture
def workspace(with_experts, tmp_path):
    return copy_of(with_experts, tmp_path / "w")


def test_two_ranks_with_a_workspace_each(workspace, tmp_path):
    """The experts that the second trains are brought to the first, and the runs that both start from to the second."""
    other = copy_of(workspace, tmp_path / "other")
    there = with_options("--workspace", str(other.root))
    domain = ("--workspace", str(workspace.root), "--domain", "notes", "--tokens", "2k", "--from", "apart")
    pretrained = launch(2, tmp_path, [MAIN, there], *command(workspace, "--method", "mix", "--name", "apart"))
    before = [open_expert(find_run(workspace, "apart"), number).record["started"] for number in range(4)]
    fresh = command(workspace, "--method", "mix", "--name", "apart", "--fresh", "--experts", "0,1")
    pretrained += launch(2, tmp_path, [MAIN, there], *fresh)
    after = [open_expert(find_run(workspace, "apart"), number).record["started"] for number in range(4)]
    assert [new > old for new, old in zip(after, before, strict=True)] == [True, True, False, False]
    experts_there = {path.name for path in other.run("apart").glob("expert-*")}
    for ended in (*pretrained, *launch(2, tmp_path, [MAIN, there], "specialize", *domain)):
        assert ended.returncode == 0, ended.stderr
    assert experts_there == {"expert-1", "expert-3"} and find_run(other, "apart").finished
    apart, together = find_run(workspace, "apart"), find_run(workspace, "mix")
    assert apart.finished and apart.record["experts"] == together.record["experts"]
    for number in range(4):
        ours, theirs = (flat(open_expert(run, number).weights()) for run in (apart, together))
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_what_one_host_has_and_another_lacks(workspace, tmp_path):
    """A domain set, a model to start from, and a teacher that is fine-tuned first."""
    other = copy_of(workspace, tmp_path / "other")
    (source,) = Store(workspace.data("notes", "train")).manifest["inputs"]["sources"]
    shutil.rmtree(other.root / "data" / "notes")
    shutil.rmtree(other.run("slm"))
    there = with_options("--workspace", str(other.root))
    options = ("--workspace", str(workspace.root), "--domain", "notes", "--tokens", "2k", "--teacher", "slm")
    known = ("--set", f"data.sets={{notes: [{source}]}}")
    for ended in launch(2, tmp_path, [MAIN, there], "specialize", *options, *known, "--name", "taught"):
        assert ended.returncode == 0, ended.stderr
    (one,) = launch(1, tmp_path, MAIN, "specialize", *options, "--name", "alone")
    assert one.returncode == 0, one.stderr
    np.testing.assert_allclose(losses(workspace, "taught"), losses(workspace, "alone"), atol=1e-5)


def test_a_published_model_in_a_new_workspace(texts, tmp_path):
    publish(tmp_path / "published", texts)
    notes = write_jsonl(tmp_path / "notes.jsonl", texts[:400])
    options = ("--workspace", str(tmp_path / "new"), "--domain", "mine", "--set", "finetuning.max_steps=4")
    for ended in launch(3, tmp_path, MAIN, "specialize", *options, "--from", str(tmp_path / "published"), str(notes)):
        assert ended.returncode == 0, ended.stderr


COPIED = """
import os, sys, mlx_slm
from pathlib import Path
import mlx_slm.storage.copies as copies
from mlx_slm.cli import _fail
from mlx_slm.errors import SlmError
from mlx_slm.machine.ranks import ranks
r, root = ranks(), Path(sys.argv[1])
copies.BUFFER = 1000
path = root / ("held" if r.rank == 0 else "shared") / "run"
def cut(name, mode):
    if CUT and mode == "rb":
        os.truncate(name, 100)
    return open(name, mode)
copies.open = cut
try:
    copies.copy_from(0, path, lambda: not path.exists())
except SlmError as error:
    sys.exit(_fail(str(error), 1))
"""


def test_a_directory_is_copied_whole_or_not_at_all(tmp_path):
    """Two ranks that share files want what the first has; then it changes while it is copied."""
    for name, size in (("a.bin", 3500), ("deep/b.bin", 0), ("deep/c.bin", 1000)):
        file = tmp_path / "held" / "run" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(i % 251 for i in range(size)))
    for cut in (True, False):
        for ended in launch(3, tmp_path, COPIED.replace("CUT", str(cut)), str(tmp_path)):
            assert ended.returncode == cut, ended.stderr
            assert not cut or ("run of rank 0 (" in ended.stderr and "changed while it was copied" in ended.stderr)
        assert cut == (not (tmp_path / "shared" / "run").exists())
        assert not list(tmp_path.glob("*/.*")), "nothing is left behind"
    files = [path.relative_to(tmp_path / "held") for path in (tmp_path / "held").rglob("*") if path.is_file()]
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "shared" / file).read_bytes() == (tmp_path / "held" / file).read_bytes()

"""Ranks that are killed, stand still, fail, differ, or never come: what the others say and do."""

import json
import shutil
import signal

import numpy as np
import pytest
from conftest import KILLED, copy_of
from together import MAIN, command, launch, losses, start, with_options

from mlx_slm.training.find import find_run

SEVERAL = "import mlx_slm.machine.ranks as r; r.BUFFER = 2000\n"


@pytest.fixture
def workspace(with_experts, tmp_path):
    return copy_of(with_experts, tmp_path / "w")


def test_two_ranks_killed_go_on_as_four_and_as_one(workspace, tmp_path):
    """A rank is killed in step 8, with several sums on their way; the last checkpoint is that of step 5, and rows go on
    from there."""
    options = command(workspace, "--method", "slm", "--name", "killed")
    first, second = launch(2, tmp_path, [SEVERAL + MAIN, SEVERAL + KILLED.format(calls=8)], *options)
    assert second.returncode == -9 and first.returncode == 3
    assert "rank 1 (" in first.stderr and "is gone: start all ranks again" in first.stderr, first.stderr
    assert launch(1, tmp_path, MAIN, *command(workspace, "--method", "slm", "--name", "whole"))[0].returncode == 0
    whole = losses(workspace, "whole")
    shutil.copytree(workspace.run("killed"), workspace.run("as-one"))
    for count, name in ((4, "killed"), (1, "as-one")):
        for ended in launch(count, tmp_path, MAIN, *command(workspace, "--method", "slm", "--name", name)):
            assert ended.returncode == 0, ended.stderr
        assert find_run(workspace, name).record["step"] == 12
        np.testing.assert_allclose(losses(workspace, name), whole, atol=1e-5)


def test_ranks_agree_to_stop(workspace, tmp_path):
    """The second rank alone is asked to stop, in step 4: both end, and the first has saved."""
    asks = KILLED.format(calls=4).replace("signal.SIGKILL", "signal.SIGTERM")
    ended = launch(2, tmp_path, [MAIN, asks], *command(workspace, "--method", "slm", "--name", "stopped"))
    assert [one.returncode for one in ended] == [130, 130], [one.stderr for one in ended]
    run = find_run(workspace, "stopped")
    assert not run.finished and 3 <= run.kept_steps()[-1] <= 6


def test_an_error_of_one_rank_is_told_by_the_others(workspace, tmp_path):
    """In step 8, while several sums of the other are on their way, of which the ring ends one."""
    raises = "from mlx_slm.errors import SlmError; raise SlmError('its disk is full')"
    fails = SEVERAL + KILLED.format(calls=8).replace("os.kill(os.getpid(), signal.SIGKILL)", raises)
    hurried = SEVERAL + "import mlx_slm.machine.watch as watch; watch.STUCK = 2.0\n"
    options = command(workspace, "--method", "slm", "--name", "failed")
    first, second = launch(2, tmp_path, [hurried + MAIN, fails], *options)
    assert second.returncode == 1 and "its disk is full" in second.stderr
    assert first.returncode == 3 and "rank 1 (" in first.stderr and "its disk is full" in first.stderr, first.stderr


def test_a_firewall_that_refuses_datagrams_ends_nothing(workspace, tmp_path):
    """What the first sends to the second is refused, as where its process were gone; the beats of the second come."""
    refused = """
import socket, mlx_slm.machine.watch as watch
watch.BEAT = 0.5
real = watch.Watch.__init__
def init(self, ranks):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        closed.bind(("127.0.0.1", 0))
        port, kind = closed.getsockname()[1], type(ranks)
    of_all = kind.of_all
    moved = lambda self, value: [of_all(self, value)[0], ["127.0.0.1", port]]
    kind.of_all = moved if ranks.is_first else of_all
    real(self, ranks)
    kind.of_all = of_all
watch.Watch.__init__ = init
"""
    options = command(workspace, "--method", "slm", "--name", "refused", "--set", "training.steps=100")
    first, second = launch(2, tmp_path, refused + MAIN, *options)
    assert first.returncode == second.returncode == 0, first.stderr
    assert "warning: datagrams (UDP) do not reach" in first.stderr


def test_a_rank_that_stands_still_is_named(workspace, tmp_path):
    """Stopped in step 8, as by a machine that hangs: the other waits for its gradient, and ends by its silence."""
    still = KILLED.format(calls=8).replace("signal.SIGKILL", "signal.SIGSTOP")
    hurried = "import mlx_slm.machine.watch as watch; watch.SILENT = 4.0\n"
    options = command(workspace, "--method", "slm", "--name", "still")
    first, second = start(2, tmp_path, [hurried + MAIN, hurried + still], *options)
    try:
        _, said = first.communicate(timeout=60)
        assert first.returncode == 3 and "rank 1 (" in said and "not been heard of for 4 s" in said, said
    finally:
        second.kill()
        second.communicate()
    assert find_run(workspace, "still").kept_steps()[-1] == 6, "that of the evaluation before"


NEWER = """
from importlib import metadata
real = metadata.version
metadata.version = lambda name: "99.0" if name == "PACKAGE" else real(name)
"""


def test_ranks_that_differ_are_told(workspace, tmp_path):
    """Another learning rate, k-means or version on the second; a number of groups that two ranks cannot share."""
    other = with_options("--set", "training.learning_rate=1e-4")
    ended = launch(2, tmp_path, [MAIN, other], *command(workspace, "--method", "slm", "--name", "other"))
    assert [one.returncode for one in ended] == [1, 1]
    assert "rank 1 (" in ended[0].stderr and "has another training than rank 0" in ended[0].stderr, ended[0].stderr
    assert not workspace.run("other").exists()
    seeded = with_options("--set", "clusters.iterations=3")
    clusters = ("cluster", "--k", "7", "-y", "--workspace", str(workspace.root))
    for ended in launch(2, tmp_path, [MAIN, seeded], *clusters):
        assert ended.returncode == 1 and "has another k-means than rank 0" in ended.stderr, ended.stderr
    for package in ("mlx-slm", "mlx"):
        newer = NEWER.replace("PACKAGE", package) + MAIN
        for ended in launch(2, tmp_path, [MAIN, newer], *command(workspace, "--method", "slm", "--name", "newer")):
            assert ended.returncode == 1 and "rank 1 (" in ended.stderr, ended.stderr
            assert f"has another version of {package} than rank 0" in ended.stderr and "99.0, not " in ended.stderr
    assert not workspace.run("newer").exists()
    code = launch(2, tmp_path, MAIN, *command(workspace, "--method", "pn", "--set", "projection.clusters_per_step=1"))
    assert [one.returncode for one in code] == [1, 1] and "2 ranks" in code[0].stderr


def test_ranks_that_do_not_find_each_other(workspace, tmp_path):
    """A host that nobody knows; a rank that is started twice, while another is missing."""
    hosts = tmp_path / "unknown.json"
    hosts.write_text(json.dumps([["127.0.0.1:1"], ["no-such-host.invalid:2"]]))
    unknown = MAIN.replace("import sys", f"import os, sys; os.environ['MLX_HOSTFILE'] = {str(hosts)!r}; import sys")
    for rank, ended in enumerate(launch(2, tmp_path, unknown, *command(workspace, "--name", "unknown"))):
        assert ended.returncode == 1 and f"rank {rank} (" in ended.stderr, ended.stderr
        assert "no-such-host.invalid" in ended.stderr and "check the names of the hosts" in ended.stderr
    twice = "import os; os.environ['MLX_RANK'] = '0'; import mlx_slm.machine.watch as w; w.CONNECTING = 3.0\n" + MAIN
    for ended in launch(2, tmp_path, twice, *command(workspace, "--name", "twice")):
        assert ended.returncode == -signal.SIGALRM, ended.stderr
        assert "has waited 3 s for rank 1 (127.0.0.1:" in ended.stderr and "start each rank once" in ended.stderr
    assert not workspace.run("unknown").exists() and not workspace.run("twice").exists()

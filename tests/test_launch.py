"""scripts/launch: ranks that are started again where one is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import copy_of, find_ports

from mlx_slm.training.find import find_run

SCRIPT = Path(__file__).parents[1] / "scripts" / "launch"
KILLED_ONCE = """
import os, signal
from pathlib import Path
flag = Path(os.environ.get("FLAG", ""))
if os.environ.get("MLX_RANK") == "1" and not flag.exists():
    import mlx_slm
    from mlx_slm.text.rows import Sampler
    real, calls = Sampler.rows, []
    def rows(self, step):
        calls.append(step)
        if len(calls) == 8:
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, step)
    Sampler.rows = rows
"""


def launch(tmp_path, port, *arguments):
    site = tmp_path / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(KILLED_ONCE)
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{SCRIPT.parents[1]}", "FLAG": str(tmp_path / "flag")}
    words = [sys.executable, str(SCRIPT), "--port", str(port), *arguments]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=120, env=environment | {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.parametrize("options", [(), ("--fewer",)], ids=["again", "fewer"])
def test_a_lost_rank_is_started_again(with_experts, tmp_path, options):
    """Killed in step 8, once: the same weights as one rank alone but for the order of sums, in 12 steps."""
    workspace = copy_of(with_experts, tmp_path / "w")
    training = ("pretrain", "--workspace", str(workspace.root), "-y", "--name", "lost")
    ended = launch(tmp_path, find_ports(2)[0], "-n", "2", *options, "--", *training)
    assert ended.returncode == 0, ended.stderr
    assert f"rank 1 of 2 is lost: starting {1 if options else 2} again" in ended.stderr
    run = find_run(workspace, "lost")
    assert run.finished and run.record["step"] == 12
    np.testing.assert_allclose(run.record["valid_nll"], find_run(workspace, "slm").record["valid_nll"], atol=1e-5)


def test_restarts_come_to_an_end(with_experts, tmp_path):
    workspace = copy_of(with_experts, tmp_path / "w")
    training = ("pretrain", "--workspace", str(workspace.root), "-y", "--name", "lost")
    ended = launch(tmp_path, find_ports(2)[0], "-n", "2", "--restarts", "0", "--", *training)
    assert ended.returncode == 3 and "given up after 0 restarts" in ended.stderr, ended.stderr


def test_what_fails_by_itself_is_not_started_again(tmp_path):
    ended = launch(tmp_path, find_ports(2)[0], "-n", "2", "--", "pretrain", "--metod", "slm")
    assert ended.returncode == 2 and "No such option '--metod'" in ended.stderr and "again" not in ended.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "not a hostfile of mlx.launch"),
        ("{", "not a hostfile of mlx.launch"),
        (json.dumps({"hosts": 3}), "not a hostfile of mlx.launch"),
        (json.dumps({"hosts": []}), "it names no host"),
        (json.dumps([{"ssh": "root@no-such-host.invalid", "ips": None}]), "'no-such-host.invalid' is not known"),
        (json.dumps([{"ips": ["127.0.0.1"]}]), "not a hostfile of mlx.launch"),
        (
            json.dumps([{"ssh": "no-such-host.invalid", "ips": ["127.0.0.1"]}]),
            "'no-such-host.invalid' is not known",
        ),
    ],
)
def test_hostfiles_that_are_none(tmp_path, text, said):
    file = tmp_path / "hosts.json"
    if text is not None:
        file.write_text(text)
    ended = launch(tmp_path, 1, "--hostfile", str(file), "--", "pretrain")
    assert ended.returncode == 1 and str(file) in ended.stderr and said in ended.stderr, ended.stderr

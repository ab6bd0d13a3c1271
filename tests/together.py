"""Programs that are started as the ranks of a ring, as `mlx.launch` does."""

import json
import os
import subprocess
import sys

import numpy as np
from conftest import find_ports

MAIN = "import sys, mlx_slm; from mlx_slm.cli import run; sys.exit(run(sys.argv[1:]))"


def start(count: int, tmp_path, programs, *arguments: str) -> list[subprocess.Popen]:
    """Start a program (or one for each rank) as `count` ranks of a ring, as `mlx.launch` does."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in find_ports(count)]))
    programs = [programs] * count if isinstance(programs, str) else programs
    alone = {"OMP_NUM_THREADS": "1"} | ({} if count == 1 else {"MLX_HOSTFILE": str(hosts)})
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, **alone, "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, program in enumerate(programs)
    ]


def launch(count: int, tmp_path, programs, *arguments: str) -> list[subprocess.CompletedProcess]:
    """Start them, and wait until all have ended."""
    ended = []
    for process in start(count, tmp_path, programs, *arguments):
        out, err = process.communicate(timeout=120)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return ended


def with_options(*options: str, program: str = MAIN) -> str:
    """The command with further options, for one of several ranks."""
    return program.replace("run(sys.argv[1:])", f"run([*sys.argv[1:], *{options!r}])")


def command(workspace, *options):
    return ("pretrain", "--workspace", str(workspace.root), "-y", "--set", "training.report_every=1", *options)


def losses(workspace, name):
    lines = map(json.loads, (workspace.run(name) / "metrics.jsonl").read_text().splitlines())
    return np.array([line.get("loss", line.get("valid_nll")) for line in lines])

"""A training step of two ranks over a link of a known speed (docs/scale.md).

The two hosts are network namespaces of this machine, and the cable between them lets so many bits a second through.
Linux, as root.

    python -m benchmarks.link [--speeds 1000,250,50]

Prints a JSON line for each speed, as docs/records keeps them: seconds of a step that sends nothing, of one that sends
its gradients when all are there, and of the step as it is, in fp32 and in bf16; medians of interleaved steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import click
import numpy as np

import mlx_slm  # noqa: F401  (before mlx: the BLAS)

# isort: split
import mlx.core as mx

from mlx_slm.machine import runtime
from mlx_slm.machine.ranks import Ranks, ranks
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.training.optimizer import AdamW
from mlx_slm.training.step import TrainingStep

SHAPE = Shape("llama", 8, 256, 1024, 4, 4, 8192, 128)
ROWS = 16
ROUNDS = 7
HOSTS = ("slm-a", "slm-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
ENDS = ("slm-va", "slm-vb")


@contextlib.contextmanager
def two_hosts() -> Iterator[None]:
    """Two network namespaces with a cable between their ENDS."""
    for name in HOSTS:
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "link", "add", ENDS[0], "type", "veth", "peer", "name", ENDS[1]], check=True)
        for name, end, address in zip(HOSTS, ENDS, ADDRESSES, strict=True):
            subprocess.run(["ip", "link", "set", end, "netns", name], check=True)
            subprocess.run(["ip", "-n", name, "addr", "add", f"{address}/24", "dev", end], check=True)
            for device in (end, "lo"):
                subprocess.run(["ip", "-n", name, "link", "set", device, "up"], check=True)
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], check=True)


@click.command()
@click.option("--speeds", default="1000,250,50", help="Of the cable, in Mbit/s.")
@click.option("--as-rank", hidden=True, type=int, help="This process is one of the two, over a cable of this speed.")
def main(speeds: str, as_rank: int | None) -> None:
    if as_rank is not None:
        facts = steps()
        if ranks().is_first:
            click.echo(
                json.dumps({"device": runtime.device_name(), "what": "step over a link", "mbits": as_rank} | facts)
            )
        return
    for speed in speeds.split(","):
        with two_hosts(), tempfile.TemporaryDirectory() as folder:
            for name, end in zip(HOSTS, ENDS, strict=True):
                shaped = ("root", "tbf", "rate", f"{speed}mbit", "burst", "256kb", "latency", "50ms")
                subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", end, *shaped], check=True)
            hosts = Path(folder) / "hosts.json"
            hosts.write_text(json.dumps([[f"{address}:23456"] for address in ADDRESSES]))
            environment = os.environ | {"MLX_HOSTFILE": str(hosts), "OMP_NUM_THREADS": "1"}
            program = [sys.executable, "-m", "benchmarks.link", "--as-rank", speed]
            both = [
                subprocess.Popen(["ip", "netns", "exec", name, *program], env=environment | {"MLX_RANK": str(rank)})
                for rank, name in enumerate(HOSTS)
            ]
            if any(process.wait() for process in both):
                sys.exit(1)


def steps() -> dict:
    """Seconds of each kind of step, and the bytes that it sends."""
    runtime.configure_device()
    together = ranks()
    real = Ranks.summed_tree

    def nothing(self: Ranks, tree: dict, dtype: mx.Dtype = mx.float32) -> dict:
        return tree

    def afterwards(self: Ranks, tree: dict, dtype: mx.Dtype = mx.float32) -> dict:
        mx.eval(tree)
        return real(self, tree, dtype)

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SHAPE.vocab_size, (ROWS, SHAPE.context_length + 1), np.int32)
    weights = np.ones((ROWS, SHAPE.context_length), np.float32)
    kinds = {
        "nothing": (nothing, "float32"),
        "afterwards": (afterwards, "float32"),
        "as_it_is": (real, "float32"),
        "afterwards_bf16": (afterwards, "bfloat16"),
        "as_it_is_bf16": (real, "bfloat16"),
    }
    made = {
        kind: TrainingStep(Transformer(SHAPE), AdamW(sent_as=wire), ROWS, initialise(SHAPE, 0))
        for kind, (_, wire) in kinds.items()
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    sent = {}
    for _ in range(ROUNDS + 1):
        for kind, (summed_tree, _) in kinds.items():
            Ranks.summed_tree = summed_tree
            step = made[kind]
            together.of_all(None)
            before, begun = together.sent, time.perf_counter()
            mx.eval(step(tokens, weights, 1e-4), step.parameters)
            seconds[kind].append(time.perf_counter() - begun)
            sent[kind] = together.sent - before
    times = {f"seconds_{kind}": round(median(values[1:]), 4) for kind, values in seconds.items()}
    facts = {"parameters": SHAPE.num_parameters, "tokens": weights.size, "rounds": ROUNDS}
    return facts | times | {f"bytes_{kind}": sent[kind] for kind in ("as_it_is", "as_it_is_bf16")}


if __name__ == "__main__":
    main()

"""Several processes that train one model: the same losses and weights as one, whatever their number."""

import numpy as np
import pytest
from conftest import copy_of
from together import MAIN, command, launch, losses

from mlx_slm.machine.trees import flat
from mlx_slm.training.find import find_run
from mlx_slm.training.runs import open_expert

RATE = "training.learning_rate=1e-4"


@pytest.fixture
def workspace(with_experts, tmp_path):
    return copy_of(with_experts, tmp_path / "w")


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        (("--method", "slm"), (1, 2, 4)),
        (("--method", "is", "--domain", "notes", "--k", "4", "--domain-share", "0.25"), (1, 2)),
        (("--method", "pn", "--set", "projection.clusters_per_step=4", "--set", "projection.h=4"), (1, 4)),
        (("--method", "pn", "--set", "projection.clusters_per_step=4"), (1, 2)),  # h = 3
    ],
    ids=["slm", "is", "pn-gathers", "pn-sums"],
)
def test_any_number_of_ranks_has_the_losses_of_one(workspace, tmp_path, options, counts):
    """50 steps. The rows are the same; sums are in another order, which is 1e-7 of a loss of 6 in each step."""
    options = (*options, "--set", "training.steps=50", "--set", "training.eval_every=25")
    for count in counts:
        for ended in launch(count, tmp_path, MAIN, *command(workspace, *options, "--name", f"of-{count}")):
            assert ended.returncode == 0, ended.stderr
    one = losses(workspace, "of-1")
    assert len(one) == 52
    for count in counts[1:]:
        np.testing.assert_allclose(losses(workspace, f"of-{count}"), one, atol=1e-5)
    records = [find_run(workspace, f"of-{count}").record for count in counts]
    assert len({(record["tokens"], record["step"]) for record in records}) == 1
    if "pn" not in options:
        assert all((workspace.model(f"of-{count}") / "model.safetensors").exists() for count in counts)


def test_experts_of_a_mixture_by_rank(workspace, tmp_path):
    """Each rank trains every second expert by itself: the same to the bit as one process after another."""
    for count in (1, 2):
        ended = launch(count, tmp_path, MAIN, *command(workspace, "--method", "mix", "--name", f"of-{count}"))
        assert [one.returncode for one in ended] == [0] * count, [one.stderr for one in ended]
    one, two = (find_run(workspace, f"of-{count}") for count in (1, 2))
    (one.path / "run.json").unlink()  # what is left are experts of another rate
    (stale,) = launch(1, tmp_path, MAIN, *command(workspace, "--method", "mix", "--name", "of-1", "--set", RATE))
    assert stale.returncode == 1 and "was started with another configuration" in stale.stderr, stale.stderr
    assert two.finished and two.record["experts"] == one.record["experts"] and len(one.record["experts"]) == 4
    for number in range(4):
        ours, theirs = (flat(open_expert(run, number).weights()) for run in (one, two))
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("source", ["slm", "pn", "mix"])
def test_fine_tuning(workspace, tmp_path, source):
    options = ("--workspace", str(workspace.root), "--domain", "notes", "--tokens", "2k")
    for count in (1, 2):
        for ended in launch(count, tmp_path, MAIN, "specialize", *options, "--from", source, "--name", f"of-{count}"):
            assert ended.returncode == 0, ended.stderr
    np.testing.assert_allclose(losses(workspace, "of-2"), losses(workspace, "of-1"), atol=1e-5)


SENT = """
import mlx_slm, mlx.core as mx, numpy as np
from functools import partial
from mlx_slm.machine.ranks import ranks
from mlx_slm.models.projected import ProjectedShape, initialise_network
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer
from mlx_slm.config.schema import ProjectionConfig
from mlx_slm.training.optimizer import AdamW
from mlx_slm.training.projected_step import ProjectedStep
from mlx_slm.machine.trees import flat
shape = Shape("llama", 1, 32, 64, 2, 2, 64, 16)
config = ProjectionConfig(k=4, h=HH, m=4)
network = ProjectedShape.of(config, shape)
step = ProjectedStep(Transformer(shape), AdamW(sent_as="WIRE"), 4, initialise_network(network, config, 0))
rng = np.random.default_rng(0)
tokens = rng.integers(0, 64, (8, 17)).astype(np.int32)
before = ranks().sent
mx.eval(step(tokens, np.ones((8, 16), np.float32), 1e-3, np.array([0, 1, 2, 3])))
shared = sum(a.size for a in flat(step.parameters["shared"]).values())
small = sum(a.size for part in "EM" for a in flat(step.parameters[part]).values())
print(ranks().sent - before, shared, small, network.projected_parameters)
"""


@pytest.mark.parametrize(("h", "wire", "size"), [(4, "float32", 4), (4, "bfloat16", 2), (3, "float32", 4)])
def test_bytes_that_a_step_of_a_network_sends(tmp_path, h, wire, size):
    """Four groups on two ranks: with h = 4 each sends its two dW, with h = 3 its part of the sum of three dT."""
    for ended in launch(2, tmp_path, SENT.replace("HH", str(h)).replace("WIRE", wire)):
        assert ended.returncode == 0, ended.stderr
        sent, shared, small, projected = map(int, ended.stdout.split())
        factors = 2 * projected * size if h == 4 else h * projected * size + small * 4
        assert sent == shared * size + factors + 4


def test_trees_and_values_of_the_first(tmp_path):
    program = """
import mlx_slm, mlx.core as mx
from mlx_slm.machine.ranks import ranks
r = ranks()
tree = {"a": mx.array([1.5, -0.0, float("nan")]), "b": {"c": mx.array(7), "d": mx.array([1, 2], mx.bfloat16)}}
got = r.tree_from_first(tree if r.is_first else None)
print(r.rank, got["a"].view(mx.uint32).tolist(), got["b"]["c"].item(), got["b"]["d"].tolist(), got["b"]["d"].dtype)
print(r.of_all({"rank": r.rank, "text": "x" * r.rank}), r.from_first("first" if r.is_first else None))
"""
    for rank, ended in enumerate(launch(3, tmp_path, program)):
        assert ended.returncode == 0, ended.stderr
        first, second = ended.stdout.splitlines()
        bits = np.array([1.5, -0.0, float("nan")], np.float32).view(np.uint32).tolist()
        assert first == f"{rank} {bits} 7 [1.0, 2.0] mlx.core.bfloat16"
        assert second == f"{[{'rank': r, 'text': 'x' * r} for r in range(3)]} first"

"""Several processes that train one model: the same losses and weights as one, whatever their number."""

import json
import shutil
import signal

import numpy as np
import pytest
from conftest import KILLED, copy_of, publish, write_jsonl
from together import MAIN, launch, start, with_options

from mlx_slm.machine.trees import flat
from mlx_slm.text.store import Store
from mlx_slm.training.find import find_run
from mlx_slm.training.runs import open_expert

SEVERAL = "import mlx_slm.machine.ranks as r; r.BUFFER = 2000\n"
RATE = "training.learning_rate=1e-4"


@pytest.fixture
def workspace(with_experts, tmp_path):
    return copy_of(with_experts, tmp_path / "w")


def command(workspace, *options):
    return ("pretrain", "--workspace", str(workspace.root), "-y", "--set", "training.report_every=1", *options)


def losses(workspace, name):
    lines = map(json.loads, (workspace.run(name) / "metrics.jsonl").read_text().splitlines())
    return np.array([line.get("loss", line.get("valid_nll")) for line in lines])


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


@pytest.mark.parametrize("source", ["slm", "pn", "mix"])
def test_fine_tuning(workspace, tmp_path, source):
    options = ("--workspace", str(workspace.root), "--domain", "notes", "--tokens", "2k")
    for count in (1, 2):
        for ended in launch(count, tmp_path, MAIN, "specialize", *options, "--from", source, "--name", f"of-{count}"):
            assert ended.returncode == 0, ended.stderr
    np.testing.assert_allclose(losses(workspace, "of-2"), losses(workspace, "of-1"), atol=1e-5)


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

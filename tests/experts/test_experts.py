"""Projected networks and mixtures as a user has them: pretraining, resuming, choosing, routing, handing over."""

import json
import os
import shutil
import signal
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import KILLED, call, copy_of, experts_of
from training.test_trainer import assert_same, everything

from mlx_slm.cli import run
from mlx_slm.config.schema import MixtureConfig
from mlx_slm.errors import Interrupted, SlmError
from mlx_slm.experts.handover import export_bundle
from mlx_slm.export.model import load_exported
from mlx_slm.finetuning.selection import score_experts
from mlx_slm.methods import mixture
from mlx_slm.methods.requests import Pretraining, Specialisation
from mlx_slm.models.transformer import Transformer
from mlx_slm.project import Project
from mlx_slm.report import Report
from mlx_slm.stages.pretrain import pretrain
from mlx_slm.stages.specialize import specialize
from mlx_slm.storage.artifacts import load_manifest
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.store import Store
from mlx_slm.training.find import find_run
from mlx_slm.training.runs import alone_in, open_expert
from mlx_slm.training.scoring import Scorer, validation_windows


@pytest.fixture
def own(with_experts, tmp_path) -> Workspace:
    """A copy to write into."""
    return copy_of(with_experts, tmp_path / "w")


@pytest.mark.parametrize(("method", "calls"), [("pn", 9), ("mix", 10)])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(method, calls, with_experts, expert_config, tmp_path):
    workspace = Workspace(tmp_path / "w")
    shutil.copytree(with_experts.root, workspace.root)
    shutil.rmtree(workspace.run(method))
    arguments = ["pretrain", "--method", method, "--workspace", str(workspace.root)]
    command = [sys.executable, "-c", KILLED.format(calls=calls), *arguments]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert not find_run(workspace, method).finished
    pretrain(Project(workspace, expert_config), Pretraining(method))
    names = [method] if method == "pn" else [f"mix/expert-{i}" for i in range(4)]
    for name in names:
        assert_same(workspace.root / "runs" / name, everything(with_experts.root / "runs" / name))


def test_a_mixture_goes_on_expert_by_expert(own, expert_config, report):
    before = {i: everything(open_expert(find_run(own, "mix"), i).path) for i in (1, 3)}
    shutil.rmtree(own.run("mix"))
    some = pretrain(Project(own, expert_config, report), Pretraining("mix", experts=[1, 3]))
    assert not some.finished and set(some.record["experts"]) == {1, 3}
    assert experts_of(own, "mix").trained == [1, 3]
    with pytest.raises(SlmError, match=r"expert 0 of run mix is not trained: run `mlx-slm pretrain --method mix .*0`"):
        experts_of(own, "mix").parameters(0)
    written = (own.run("mix") / "expert-1" / "run.json").stat().st_mtime_ns
    whole = pretrain(Project(own, expert_config, report), Pretraining("mix"))
    assert whole.finished and set(whole.record["experts"]) == {0, 1, 2, 3}
    assert (own.run("mix") / "expert-1" / "run.json").stat().st_mtime_ns == written
    for i, expected in before.items():
        assert_same(own.run("mix") / f"expert-{i}", expected)
    assert whole.record["step"] == 4 * 3, "the horizon of 12 steps is shared by four experts"
    with pytest.raises(SlmError, match=r"--experts 4: the mixture has the experts 0 to 3"):
        pretrain(Project(own, expert_config, report), Pretraining("mix", experts=[4]))


def test_a_mixture_of_many_opens_no_more_files(own, expert_config, report, monkeypatch):
    """macOS lets a process have 256 files open; each job had the assignments open for itself."""
    opened = []
    monkeypatch.setattr(mixture, "work", lambda *_: opened.append(len(os.listdir("/dev/fd"))))
    for k in (2, 64):
        config = expert_config.model_copy(update={"mixture": MixtureConfig(k=k)})
        pretrain(Project(own, config, report), Pretraining("mix", name=f"mix{k}"))
    assert len(opened) > 40 and max(opened) - opened[0] <= 2, opened


@pytest.mark.parametrize(("name", "select"), [("pn", "frequent"), ("pn", "histogram"), ("mix", "pretrained")])
def test_a_specialised_expert_is_a_plain_model(name, select, own, expert_config, report):
    tuned = specialize(
        Project(own, expert_config, report), Specialisation("notes", source=name, tokens=4000, select=select)
    )
    base = specialize(Project(own, expert_config, report), Specialisation("notes", source="slm", tokens=4000))
    assert tuned.name == f"notes-{name}-{select}-4k"
    layouts = []
    for one in (tuned, base):
        arrays = mx.load(str(own.model(one.name) / "model.safetensors"))
        layouts.append({name: (value.shape, value.dtype) for name, value in arrays.items()})
        layouts[-1]["files"] = sorted(p.name for p in own.model(one.name).iterdir())
        layouts[-1]["config"] = json.loads((own.model(one.name) / "config.json").read_text())
    assert layouts[0] == layouts[1]
    sizes = [(own.model(one.name) / "model.safetensors").stat().st_size for one in (tuned, base)]
    assert sizes[0] == sizes[1]
    selection = load_manifest(own.model(tuned.name), "model")["info"]["selection"]
    assert selection == json.loads(json.dumps(tuned.record["selection"])) and selection["select"] == select
    for made in ("runs/pn", "runs/mix", "clusters"):
        shutil.rmtree(own.root / made)
    store = Store(own.data("notes", "valid"))
    windows = validation_windows(store, expert_config.finetuning.eval_tokens, 0)
    score = Scorer(load_exported(own.model(tuned.name))[0])(store, windows)
    assert score.nll == pytest.approx(tuned.record["valid_nll"], rel=1e-6), "nothing of the network is needed"


def test_finetuned_tries_all_and_keeps_the_best_and_goes_on_after_a_kill(own, expert_config, report):
    tuned = specialize(
        Project(own, expert_config, report), Specialisation("notes", source="mix", tokens=4000, select="finetuned")
    )
    selection = tuned.record["selection"]
    assert set(selection["scores"]) == {0, 1, 2, 3}
    assert tuned.record["valid_nll"] == min(selection["scores"].values()) == selection["scores"][selection["expert"]]
    alone = specialize(
        Project(own, expert_config, report), Specialisation("notes", source="mix", tokens=4000, name="alone")
    )
    assert alone.record["selection"]["select"] == "frequent", "a mixture's default"
    other = alone.record["selection"]["expert"]
    assert alone.record["valid_nll"] == selection["scores"][other]
    assert not list(tuned.path.glob("expert-*"))
    assert selection["cost"]["tokens"] > 3 * tuned.record["tokens"]

    command = ["specialize", "--domain", "notes", "--from", "mix", "--tokens", "4k", "--select", "finetuned"]
    command += ["--name", "killed", "--workspace", str(own.root)]
    killed = [sys.executable, "-c", KILLED.format(calls=50), *command]
    assert subprocess.run(killed, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert len(list(own.run("killed").glob("expert-*"))) == 2
    assert run(command) == 0
    again = find_run(own, "killed").record["selection"]
    assert again["scores"] == json.loads(json.dumps(selection["scores"])) and again["expert"] == selection["expert"]


def test_validation_in_training_is_the_routed_one(with_experts, expert_config):
    record = find_run(with_experts, "pn").record
    experts, store = experts_of(with_experts, "pn"), Store(with_experts.data("generic", "valid"))
    windows = validation_windows(store, expert_config.training.eval_tokens, 0)
    place = experts.clusters.assigned("generic", "valid").clusters[:][windows]
    total = 0.0
    for cluster in np.unique(place):
        model = Transformer(experts.run.shape)
        model.update(experts.parameters(int(cluster)))
        total += Scorer(model).window_nll(store, windows[place == cluster]).sum()
    assert record["valid_nll"] == pytest.approx(total / store.windows[:]["length"][windows].sum(), rel=1e-6)


class Declines(Report):
    def confirm(self, question):
        return False


def test_a_mixture_is_announced_as_a_whole_and_a_no_keeps_it(own, expert_config, monkeypatch):
    before = everything(own.run("mix") / "expert-2")
    monkeypatch.setattr("mlx_slm.methods.work.likely_flops", lambda: 1.0)
    with pytest.raises(Interrupted, match="nothing was lost"):
        pretrain(Project(own, expert_config, Declines()), Pretraining("mix", fresh=True))
    assert_same(own.run("mix") / "expert-2", before)
    assert find_run(own, "mix").finished


def test_an_expert_that_is_trained_again_is_missing_until_it_is_done(own, expert_config, tmp_path, report):
    arguments = ["pretrain", "--method", "mix", "--fresh", "--experts", "2", "--workspace", str(own.root)]
    started = find_run(own, "mix").identity
    interrupt = KILLED.format(calls=2).replace("SIGKILL", "SIGINT")
    assert (
        subprocess.run([sys.executable, "-c", interrupt, *arguments], capture_output=True, check=False).returncode
        == 130
    )
    run_ = find_run(own, "mix")
    assert not run_.finished and set(run_.record["experts"]) == {"0", "1", "3"} and run_.identity != started
    with pytest.raises(SlmError, match="run mix is not finished"):
        export_bundle(own, run_, tmp_path / "b")
    pretrain(Project(own, expert_config, report), Pretraining("mix"))
    assert find_run(own, "mix").finished
    other = expert_config.model_copy(update={"training": expert_config.training.model_copy(update={"seed": 3})})
    with pytest.raises(SlmError, match="start the whole mixture over with --fresh and without --experts"):
        pretrain(Project(own, other, report), Pretraining("mix", fresh=True, experts=[1]))


def test_two_processes_do_not_train_one_mixture(own, expert_config, report):
    with alone_in(own.run("mix")), pytest.raises(SlmError, match="run mix is being trained by another process"):
        pretrain(Project(own, expert_config, report), Pretraining("mix", fresh=True))
    assert find_run(own, "mix").finished


def test_clusters_that_were_rebuilt_are_refused(own, expert_config, capsys):
    changed = ("--set", "clusters.seed=7", "--set", "clusters.dims=8", "--set", "clusters.encoder=lsi")
    assert call(capsys, own, "cluster", "--k", "4", "--fresh", *changed)[0] == 0
    for command in (("specialize", "--domain", "notes", "--from", "pn"), ("evaluate", "mix", "--domain", "notes")):
        code, _, err = call(capsys, own, *command)
        assert code == 1 and "clusters/4 was rebuilt since run" in err and "--fresh" in err
    shutil.rmtree(own.clusters(4))
    code, _, err = call(capsys, own, "specialize", "--domain", "notes", "--from", "pn")
    assert code == 1 and "run `mlx-slm cluster --k 4`" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("specialize", "--domain", "notes", "--select", "histogram"), "run slm has no experts to choose from"),
        (("specialize", "--domain", "notes", "--from", "none", "--select", "frequent"), "has no experts"),
        (("specialize", "--domain", "notes", "--from", "mix", "--select", "histogram"), "needs a projected network"),
        (("specialize", "--domain", "notes", "--from", "pn@5M"), "keeps no checkpoint after 5M tokens"),
        (("specialize", "--domain", "nothing", "--from", "pn"), "unknown set 'nothing'"),
        (("evaluate", "slm", "--expert", "1"), "slm is a single model"),
        (("evaluate", "pn", "--expert", "4"), "run pn has the experts 0 to 3, not 4"),
        (("evaluate", "pn", "--expert", "²"), "give the number of an expert, frequent or histogram"),
        (("evaluate", "pn", "--expert", "best"), "give the number of an expert, frequent or histogram"),
        (("evaluate", "mix", "--expert", "histogram"), "experts of a mixture share nothing to combine"),
        (("info", "slm"), "run slm has no experts to compare"),
        (("pretrain", "--method", "pn", "--name", "x", "--set", "training.batch_rows=9"), "is not a multiple of"),
        (("pretrain", "--method", "pn", "--set", "projection.layers=[]"), "name at least one layer, and each once"),
        (("pretrain", "--method", "pn", "--set", "projection.layers=[1,1]"), "name at least one layer, and each once"),
        (("pretrain", "--method", "pn", "--name", "x", "--set", "projection.k=9999"), "more than the"),
        (("pretrain", "--method", "pn", "--name", "x", "--set", "training.micro_rows=2"), "of the 4 rows of a group"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, with_experts, capsys):
    code, _, err = call(capsys, with_experts, *arguments)
    assert code == 1 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretrain", "--experts", "3"), "--experts is for --method mix"),
        (("pretrain", "--k", "3"), "--k is for the methods is, cis, pn and mix"),
        (("pretrain", "--method", "mix", "--experts", "3-1"), "'3-1' is not a number or a range"),
        (("export", "pn", "--bundle", "x", "--format", "gguf"), "goes with --type and --fuse alone"),
    ],
)
def test_wrong_usage(arguments, message, with_experts, capsys):
    code, _, err = call(capsys, with_experts, *arguments)
    assert code == 2 and message in err


def test_a_histogram_over_clusters_without_generic_text_is_refused(with_experts):
    experts = experts_of(with_experts, "pn")
    experts.generic = np.array([1.0, 0, 2, 3])
    with pytest.raises(SlmError, match="mass on cluster 1, which has no generic text"):
        experts.parameters(np.full(4, 0.25))
    assert experts.trained == [0, 2, 3]
    assert set(score_experts(experts, Store(with_experts.data("notes", "valid")), np.arange(5), Report())) == {0, 2, 3}

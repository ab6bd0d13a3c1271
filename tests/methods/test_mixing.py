"""Importance sampling with the domain's own text among its rows, and with a rate that falls at the end."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import call, copy_of, small_config, write_jsonl
from mlx.utils import tree_flatten

from mlx_slm.clustering.target import SamplingTarget
from mlx_slm.config.files import dump_config
from mlx_slm.config.schema import ClustersConfig, TrainingConfig
from mlx_slm.errors import SlmError
from mlx_slm.methods import work
from mlx_slm.methods.mixing import mixed, mixes, mixing_of
from mlx_slm.methods.requests import Pretraining
from mlx_slm.project import Project
from mlx_slm.stages.pretrain import pretrain
from mlx_slm.training.find import find_run
from mlx_slm.training.runs import branch_path
from mlx_slm.training.schedule import Schedule, State

DOMAIN = SamplingTarget("notes")


@pytest.fixture
def workspace(prepared, config, tmp_path):
    workspace = copy_of(prepared, tmp_path / "w")
    workspace.config_file.write_text(dump_config(config))
    return workspace


def config_of(share, last=None, cooldown=0.0):
    training = TrainingConfig(steps=100, schedule="constant", cooldown=cooldown)
    return small_config(clusters=ClustersConfig(domain_share=share, cooldown_share=last), training=training)


def test_shares_by_hand():
    """100 steps of 56 rows."""
    plain = mixing_of(config_of(0.0), 100, 10**6)
    assert plain.mean == 0 and plain.inputs == {}, "nothing new in the records of runs without it"
    assert mixing_of(config_of(0.1), 100, 10**6).phases == [(0, 0.1)]
    assert mixing_of(config_of(0.1), 100, 0).phases == [(0, 0.0)], "of no domain"
    for config, steps in ((config_of(0.1, 0.5), 100), (config_of(0.1, 0.5, cooldown=0.01), 40)):
        with pytest.raises(SlmError, match=r"cooldown_share=0.5 is for the last steps, .* leaves none"):
            mixing_of(config, steps, 10**6)
    with pytest.raises(SlmError, match=r"domain_share=0.001: of 560 rows that is none"):
        mixing_of(config_of(0.001), 10, 10**6)
    moving = mixing_of(config_of(0.1, 0.5, cooldown=0.2), 100, 10**6)
    assert moving.phases == [(0, 0.1), (80, 0.5)] and moving.mean == pytest.approx(0.8 * 0.1 + 0.2 * 0.5)
    assert mixing_of(config_of(0.1, cooldown=0.2), 100, 10**6).phases == [(0, 0.1)]
    often = mixing_of(config_of(0.1, 0.5, cooldown=0.2), 100, 14)
    assert often.mean * 5600 == pytest.approx(20 * 14), "no more than 20 passes"
    assert often.phases[1][1] == pytest.approx(5 * often.phases[0][1])
    np.testing.assert_allclose(mixed(np.array([0.25, 0.75]), 0.2), [0.2, 0.6, 0.2])
    weights = SamplingTarget(weights="w.yaml")
    assert mixes(config_of(0.1), DOMAIN) and not mixes(config_of(0.1), weights) and not mixes(config_of(0.0), DOMAIN)


def test_the_rate_falls_to_zero_at_the_end():
    """Constant 1 after 10 steps of warm-up; the last 20 of 100 fall by a twentieth each."""
    schedule = Schedule(100, 1.0, 10, 8, 10, 10, 10, cooldown_steps=20)
    rates = [schedule.rate(step, State()) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert set(rates[10:81]) == {1.0}
    np.testing.assert_allclose(rates[80:], np.arange(20, 0, -1) / 20)


def test_a_run_with_the_domain_among_its_rows(workspace, capsys, monkeypatch):
    """A quarter of the rows: two of eight in each step, and half of them while the rate falls."""
    seen, real = [], work.Sampler

    class Watched(real):
        def rows(self, step):
            found = super().rows(step)
            seen.append((step, int((found[2] == len(self.streams) - 1).sum())))
            return found

    monkeypatch.setattr(work, "Sampler", Watched)
    command = ("pretrain", "--method", "is", "--domain", "notes", "--k", "4", "--domain-share", "0.25")
    falling = ("--set", "training.cooldown=0.25", "--set", "clusters.cooldown_share=0.5")
    code, out, err = call(capsys, workspace, *command, *falling, "--json")
    assert code == 0, err
    run = find_run(workspace, json.loads(out)["run"])
    assert dict(seen) == {step: 2 if step < 9 else 4 for step in range(13)}, "a step ahead is drawn"
    facts, said = run.importance(), run.record["inputs"]["importance"]
    assert (said["domain_share"], said["cooldown_share"]) == (0.25, 0.5) and run.record["inputs"]["training"][
        "cooldown"
    ]
    assert facts["domain_share"] == pytest.approx((9 * 2 + 3 * 4) / 96)
    code, _, err = call(capsys, workspace, *command)
    assert code == 1 and "cooldown" in err, "another training"
    code, out, err = call(capsys, workspace, *command, *falling)
    assert code == 0 and "is finished" in out, err


def test_a_milestone_is_the_model_of_a_training_that_ends_there(workspace, capsys):
    """Step 6 of 12, the rate falling from step 4 on, and the domain's share with it: as trained for 6 steps."""
    command = ("pretrain", "--method", "is", "--domain", "notes", "--k", "4", "--domain-share", "0.25")
    command += ("--set", "training.cooldown=0.34", "--set", "clusters.cooldown_share=0.5")
    longer = (*command, "--name", "longer", "--set", "training.milestones=[1536]")
    code, out, err = call(capsys, workspace, *longer)
    assert code == 0 and "its rate falls from step 4 to 6" in out + err, err
    assert call(capsys, workspace, *command, "--name", "short", "--set", "training.steps=6")[0] == 0
    milestone, short = find_run(workspace, "longer@1536"), find_run(workspace, "short")
    assert milestone.weights_step() == short.weights_step() == 6
    expected = dict(tree_flatten(short.weights()))
    for name, value in tree_flatten(milestone.weights()):
        assert mx.array_equal(value, expected[name]), name
    code, out, err = call(capsys, workspace, *longer)
    assert code == 0 and "falls from" not in out + err, "it is there"
    shutil.rmtree(branch_path(milestone.path, 6))
    code, out, err = call(capsys, workspace, *longer)
    assert code == 0 and "falls from step 4 to 6" in out + err, "made again from the checkpoint before it"
    code, _, err = call(capsys, workspace, *longer[:-1], "training.milestones=[1792]")
    assert code == 0 and "keeps no checkpoint at step 5" in err
    assert call(capsys, workspace, "specialize", "--domain", "notes", "--from", "longer@1536")[0] == 0


def test_going_on_from_the_generic_model(workspace, capsys):
    command = ("pretrain", "--method", "cis", "--domain", "notes", "--k", "4", "--set", "training.steps=3")
    code, _, err = call(capsys, workspace, *command)
    assert code == 1 and "goes on from a run of method slm, and there is none" in err
    assert call(capsys, workspace, "pretrain")[0] == 0
    code, out, err = call(capsys, workspace, *command, "--json")
    assert code == 0, err
    run, slm = (find_run(workspace, name) for name in (json.loads(out)["run"], "slm"))
    inputs = run.record["inputs"]
    assert run.name == "cis-notes-all" and inputs["importance"]["domain"] == "notes" and "init_from" in inputs
    moved = [
        float(mx.abs(one - two).max())
        for (_, one), (_, two) in zip(tree_flatten(run.weights()), tree_flatten(slm.weights()), strict=True)
    ]
    assert 0 < max(moved) < 3 * 1.1 * 3e-3, "three steps of Adam, each by the rate at most"
    with pytest.raises(SlmError, match="name it with --init-from, such as slm"):
        pretrain(Project(workspace, small_config()), Pretraining("cis", target=DOMAIN))


def test_what_cannot_be(workspace, tmp_path, capsys, texts):
    command = ("pretrain", "--method", "is", "--k", "4")
    for options, code, message in (
        (("--domain", "notes", "--domain-share", "1"), 2, "0<=x<1"),
        (("--domain", "notes", "--domain-share", "-0.1"), 2, "0<=x<1"),
        (
            ("--domain", "notes", "--set", "clusters.domain_share=1.5"),
            1,
            "clusters.domain_share: 1.5 is no share: give",
        ),
        (("--domain", "notes", "--set", "training.cooldown=500"), 1, "training.cooldown: 500 is no share"),
        (("--domain", "notes", "--set", "finetuning.replay=-1"), 1, "finetuning.replay: -1 is no share"),
        (("--domain", "notes", "--set", "projection.soup=nan"), 1, "projection.soup: input should be a finite number"),
        (("--domain", "notes", "--set", "training.cooldown=0.1", "--set", "training.schedule=cosine"), 1, "falls by"),
        (("--weights", "w.yaml", "--domain-share", "0.1"), 2, "--domain-share needs --domain"),
    ):
        found, _, err = call(capsys, workspace, *command, *options)
        assert found == code and message in err, (options, err)
    tiny = write_jsonl(tmp_path / "tiny.jsonl", ["a b"])
    held = write_jsonl(tmp_path / "held.jsonl", texts[:20])
    sources = (f"train={tiny}", f"valid={held}", f"test={held}")
    assert call(capsys, workspace, "prepare", "tiny", *sources)[0] == 0
    code, _, err = call(capsys, workspace, *command, "--domain", "tiny", "--domain-share", "0.1")
    assert code == 1 and "tokens to train on, a row 32" in err and not workspace.run("is-tiny-all").exists()


def test_shares_that_leave_no_rows_are_named():
    """Ten steps of 56 rows."""
    for config, message in (
        (config_of(0.999), r"clusters.domain_share=0.999: of 560 rows none is left for the generic set"),
        (config_of(0.0, 0.001, cooldown=0.5), r"clusters.cooldown_share=0.001: of 560 rows that is none"),
    ):
        with pytest.raises(SlmError, match=message):
            mixing_of(config, 10, 10**6)
    assert mixing_of(config_of(0.0, 0.5), 10, 0).mean == 0, "weights of clusters: no domain is mixed in"


def test_a_milestone_that_was_not_finished_is_no_model_yet(workspace, capsys):
    """The rate of the milestone at step 6 begins to fall at step 4, where the run has a checkpoint of its own: what
    stands for 1,024 tokens is the one that the rate fell for, or none."""
    command = ("pretrain", "--name", "m", "--set", "training.cooldown=0.34")
    command += ("--set", "training.milestones=[1024,1536]")
    code, _, err = call(capsys, workspace, *command)
    assert code == 0 and "is lost" not in err and "beyond the horizon" not in err, err
    run = find_run(workspace, "m")
    assert run.kept_steps() == [4, 6, 12] and find_run(workspace, "m@1024").weights_step() == 4
    shutil.rmtree(branch_path(run.path, 4))
    code, _, err = call(capsys, workspace, "specialize", "--domain", "notes", "--from", "m@1024")
    assert code == 1 and "run its command again where it was broken off" in err

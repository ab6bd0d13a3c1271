"""Pretraining: where it starts, what a run keeps as it began, milestones."""

import mlx.core as mx
import pytest
from conftest import copy_of, experts_of
from mlx.utils import tree_flatten

from mlx_slm.config.schema import MixtureConfig
from mlx_slm.errors import SlmError
from mlx_slm.experts.bundle import find_source
from mlx_slm.experts.experts import Experts
from mlx_slm.experts.handover import export_bundle
from mlx_slm.export.model import load_exported
from mlx_slm.methods.requests import Pretraining, Specialisation
from mlx_slm.project import Project
from mlx_slm.stages.pretrain import pretrain
from mlx_slm.stages.specialize import specialize
from mlx_slm.storage.workspace import Workspace
from mlx_slm.training.checkpoint import checkpoint_steps
from mlx_slm.training.find import find_run
from mlx_slm.training.runs import open_expert


@pytest.fixture
def own(with_experts, tmp_path) -> Workspace:
    """A copy to write into."""
    return copy_of(with_experts, tmp_path / "w")


def test_an_expert_of_a_mixture_can_start_from_the_generic_run(own, expert_config, report):
    budget = expert_config.model_copy(update={"mixture": MixtureConfig(k=4, tokens=256)})
    pretrain(Project(own, budget, report), Pretraining("mix", name="upcycled", init_from=own.model("slm"), experts=[2]))
    record = open_expert(find_run(own, "upcycled"), 2).record
    assert record["step"] == 1 and record["inputs"]["init_from"]
    start = dict(tree_flatten(load_exported(own.model("slm"))[0].parameters()))
    moved = dict(tree_flatten(open_expert(find_run(own, "upcycled"), 2).weights()))
    change = max(mx.abs(moved[name] - start[name]).max().item() for name in start)
    assert 0 < change < 1.1 * expert_config.training.learning_rate / 4, "one Adam step of the warm-up away"


def test_a_network_can_start_from_the_generic_run(own, expert_config, report):
    longer = expert_config.model_copy(update={"training": expert_config.training.model_copy(update={"steps": 1})})
    pretrain(Project(own, longer, report), Pretraining("pn", name="grown", init_from=own.model("slm")))
    start = dict(tree_flatten(load_exported(own.model("slm"))[0].parameters()))
    network, step = experts_of(own, "grown").network, expert_config.training.learning_rate / 4
    for name, T in network["T"].items():
        assert mx.abs(T[0] - start[name]).max().item() < 1.1 * step, "one Adam step of the warm-up away"
        assert mx.abs(T[1:]).max().item() < 1.1 * step
    for name, value in tree_flatten(network["shared"]):
        assert mx.abs(value - start[name]).max().item() < 1.1 * step


def test_the_clusters_of_a_step_stay_as_a_run_began_with_them(own, expert_config, report, monkeypatch):
    from mlx_slm.training import projected_step

    auto = expert_config.projection.model_copy(update={"clusters_per_step": None})
    config = expert_config.model_copy(update={"projection": auto})
    for groups, fresh, expected in ((4, False, 4), (2, False, 4), (2, True, 2)):
        monkeypatch.setattr(projected_step, "_most_groups", lambda *_, g=groups: g)
        record = pretrain(Project(own, config, report), Pretraining("pn", name="auto", fresh=fresh)).record
        assert record["inputs"]["projection"]["clusters_per_step"] == expected
    with pytest.raises(SlmError, match=r"run slm was started with another configuration"):
        pretrain(Project(own, config, report), Pretraining("pn", name="slm"))
    fewer = config.model_copy(update={"training": config.training.model_copy(update={"batch_rows": 3})})
    with pytest.raises(SlmError, match=r"run auto was started with another configuration .*batch_rows 8 -> 3"):
        monkeypatch.setattr(projected_step, "_most_groups", lambda *_: 3)
        pretrain(Project(own, fewer, report), Pretraining("pn", name="auto"))


def test_milestones_are_kept_and_stand_for_the_run(own, expert_config, tmp_path, report):
    milestones = {"milestones": [512, 2048], "checkpoint_every": 2}
    training = expert_config.training.model_copy(update=milestones)
    config = expert_config.model_copy(update={"training": training})
    pretrain(Project(own, config, report), Pretraining("pn", name="kept"))
    whole = find_run(own, "kept")
    assert checkpoint_steps(whole.path) == [2, 8, 10, 12], "512 and 2,048 tokens, and the last two"
    early = find_run(own, "kept@512")
    assert early.weights_step() == 2 and whole.weights_step() == 12
    tuned = specialize(Project(own, config, report), Specialisation("notes", source="kept@512", tokens=4000))
    assert tuned.record["inputs"]["from"]["step"] == 2
    assert tuned.record["selection"]["select"] == "histogram", "a network's default"
    with pytest.raises(
        SlmError, match=r"keeps no checkpoint after 1k tokens \(step 4; it has the steps 2, 8, 10, 12\)"
    ):
        find_run(own, "kept@1k")
    with pytest.raises(SlmError, match="a mixture has no milestones"):
        find_run(own, "mix@512")
    export_bundle(own, early, tmp_path / "bundle")
    handed = find_source(own, str(tmp_path / "bundle"))
    assert handed.record["tokens"] < 520 and handed.finished
    for name, value in tree_flatten(Experts(own, handed).parameters(1)):
        assert mx.array_equal(value, dict(tree_flatten(Experts(own, early).parameters(1)))[name])

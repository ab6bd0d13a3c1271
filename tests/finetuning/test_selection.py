"""Which expert a domain gets."""

import shutil

import numpy as np
import pytest
from conftest import copy_of, experts_of

from mlx_slm.clustering.importance import histogram
from mlx_slm.errors import SlmError
from mlx_slm.finetuning.domain import domain_set
from mlx_slm.finetuning.selection import select_expert
from mlx_slm.methods.requests import Pretraining, Specialisation
from mlx_slm.models.transformer import Transformer
from mlx_slm.project import Project
from mlx_slm.stages.pretrain import pretrain
from mlx_slm.stages.specialize import specialize
from mlx_slm.storage.records import write_record
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.store import Store, first_windows
from mlx_slm.training.find import find_run
from mlx_slm.training.scoring import Scorer


@pytest.fixture
def own(with_experts, tmp_path) -> Workspace:
    """A copy to write into."""
    return copy_of(with_experts, tmp_path / "w")


def test_frequent_and_histogram_are_those_of_the_tokens(with_experts, expert_config):
    experts, store = experts_of(with_experts, "pn"), Store(with_experts.data("notes", "train"))
    project = Project(with_experts, expert_config)
    windows, domain = first_windows(store, 4000, 0), domain_set(project, "notes", 4000, [])
    place = experts.clusters.assigned("notes", "train").clusters[:]
    lengths = store.windows[:]["length"]
    counts = np.zeros(4)
    for window in windows:
        counts[place[window]] += lengths[window]
    found = select_expert(project, experts, "histogram", domain)
    np.testing.assert_allclose(found["histogram"], counts / counts.sum())
    assert np.allclose(counts, histogram(place[windows], lengths[windows], 4))
    frequent = select_expert(project, experts, "frequent", domain)
    assert frequent["expert"] == counts.argmax() and frequent["share"] == pytest.approx(counts.max() / counts.sum())


@pytest.mark.parametrize("name", ["pn", "mix"])
def test_pretrained_takes_the_lowest_loss_on_the_domain_set(name, with_experts, expert_config):
    experts, store = experts_of(with_experts, name), Store(with_experts.data("notes", "train"))
    finetuning = expert_config.finetuning.model_copy(update={"select_tokens": 1500})
    project = Project(with_experts, expert_config).having(finetuning=finetuning)
    found = select_expert(project, experts, "pretrained", domain_set(project, "notes", 4000, []))
    sample = first_windows(store, 1500, 0)
    by_hand = {}
    for i in range(4):
        model = Transformer(experts.run.shape)
        model.update(experts.parameters(i))
        by_hand[i] = Scorer(model)(store, sample).nll
    assert found["expert"] == min(by_hand, key=by_hand.get) and len(set(by_hand.values())) == 4
    assert found["scores"] == pytest.approx(by_hand, rel=1e-6)
    assert found["cost"]["tokens"] == 4 * store.windows[:]["length"][sample].sum()


def test_a_choice_from_more_experts_is_another_run(own, expert_config, report):
    shutil.rmtree(own.run("mix"))
    pretrain(Project(own, expert_config, report), Pretraining("mix", experts=[1]))
    first = specialize(
        Project(own, expert_config, report), Specialisation("notes", source="mix", tokens=4000, select="pretrained")
    )
    assert set(first.record["selection"]["scores"]) == {1}
    pretrain(Project(own, expert_config, report), Pretraining("mix"))
    with pytest.raises(SlmError, match="another configuration"):
        specialize(
            Project(own, expert_config, report), Specialisation("notes", source="mix", tokens=4000, select="pretrained")
        )
    shutil.rmtree(own.run("mix"))
    (own.run("mix")).mkdir()
    shutil.copyfile(own.run("pn") / "config.yaml", own.run("mix") / "config.yaml")
    record = find_run(own, "notes-mix-pretrained-4k").record
    inputs = find_run(own, "pn").record["inputs"] | {"method": "mix", "mixture": {"k": 4}}
    del inputs["projection"]
    changes = {"method": "mix", "status": "running", "inputs": inputs}
    write_record(own.run("mix") / "run.json", record | changes)
    with pytest.raises(SlmError, match="run mix has no trained expert yet"):
        specialize(
            Project(own, expert_config, report),
            Specialisation("notes", source="mix", tokens=4000, select="finetuned", name="y"),
        )


def test_a_domain_of_few_tokens_is_scored_whole(own, expert_config, report):
    store = Store(own.data("notes", "train"))
    finetuning = expert_config.finetuning.model_copy(update={"select_tokens": store.num_tokens + 1, "max_steps": 2})
    few = expert_config.model_copy(update={"finetuning": finetuning})
    tuned = specialize(Project(own, few, report), Specialisation("notes", source="pn", select="pretrained"))
    assert tuned.record["selection"]["cost"]["tokens"] == 4 * store.num_tokens

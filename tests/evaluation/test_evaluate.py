"""Perplexity of runs with experts, each window through one of them, or all through one."""

import math

import numpy as np
import pytest
from conftest import copy_of, experts_of

from mlx_slm.evaluation.evaluate import evaluate, macro_perplexity
from mlx_slm.methods.requests import Specialisation
from mlx_slm.models.transformer import Transformer
from mlx_slm.project import Project
from mlx_slm.stages.specialize import specialize
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.store import Store
from mlx_slm.training.scoring import Score, Scorer


@pytest.fixture
def own(with_experts, tmp_path) -> Workspace:
    """A copy to write into."""
    return copy_of(with_experts, tmp_path / "w")


@pytest.mark.parametrize("name", ["pn", "mix"])
def test_evaluation_routes_each_window_through_its_clusters_expert(name, own, expert_config, report):
    experts, store = experts_of(own, name), Store(own.data("notes", "test"))
    found = evaluate(Project(own, expert_config, report), [name], domains=["notes"], split="test")["results"][0]
    place = experts.clusters.assigned("notes", "test").clusters[:]
    assert len(np.unique(place)) > 1
    total = 0.0
    for cluster in np.unique(place):
        model = Transformer(experts.run.shape)
        model.update(experts.parameters(int(cluster)))
        total += Scorer(model).window_nll(store, np.flatnonzero(place == cluster)).sum()
    assert found["routing"] == "cluster" and found["tokens"] == store.num_tokens
    assert found["nll"] == pytest.approx(total / store.num_tokens, rel=1e-6)
    one = evaluate(Project(own, expert_config, report), [name], domains=["notes"], split="test", expert="2")["results"][
        0
    ]
    model.update(experts.parameters(2))
    assert one["nll"] == pytest.approx(Scorer(model)(store, np.arange(store.num_windows)).nll, rel=1e-6)
    frequent = evaluate(
        Project(own, expert_config, report), [name], domains=["notes"], split="test", expert="frequent"
    )["results"][0]
    shares = experts.histogram(expert_config, "notes", np.arange(Store(own.data("notes", "train")).num_windows), report)
    assert (frequent["routing"], frequent["expert"]) == ("frequent", shares.argmax())
    if name == "pn":
        mixed = evaluate(
            Project(own, expert_config, report), [name], domains=["notes"], split="test", expert="histogram"
        )["results"][0]
        model.update(experts.parameters(shares))
        assert mixed["nll"] == pytest.approx(Scorer(model)(store, np.arange(store.num_windows)).nll, rel=1e-6)


def test_one_expert_for_all_is_chosen_as_specialising_chooses_it(own, expert_config, report):
    tuned = specialize(
        Project(own, expert_config, report), Specialisation("notes", source="pn", tokens=4000, select="frequent")
    )
    row = evaluate(
        Project(own, expert_config, report), ["pn"], domains=["notes"], split="test", expert="frequent", tokens=4000
    )["results"][0]
    assert row["expert"] == tuned.record["selection"]["expert"]


def test_macro_average_weighs_sets_alike():
    one, two = (Score(tokens, nll, 0.0, math.exp(nll), 1.0, 1) for tokens, nll in ((10, 2.0), (10**6, 4.0)))
    assert macro_perplexity([one, two]) == pytest.approx(math.exp(3))

"""Weights of clusters that are learnt from what experts predict."""

import json
import shutil

import numpy as np
import pytest
import yaml
from conftest import call, copy_of

from mlx_slm.clustering.importance import read_weights
from mlx_slm.errors import SlmError
from mlx_slm.finetuning.weights import likeliest_mixture
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.text.store import Store
from mlx_slm.training.find import find_run
from mlx_slm.training.scoring import Scorer


def test_tokens_that_only_one_expert_knows_by_hand():
    """Of ten tokens expert 0 gives seven a chance of 1/2 and the rest none, expert 1 the other three, 2 all 1/1000."""
    chances = np.full((10, 3), 1e-12)
    chances[:7, 0], chances[7:, 1], chances[:, 2] = 0.5, 0.5, 1e-3
    weights, mean = likeliest_mixture(np.log(chances))
    np.testing.assert_allclose(weights, [0.7, 0.3, 0], atol=1e-4)
    assert mean == pytest.approx(0.7 * np.log(0.35) + 0.3 * np.log(0.15), abs=1e-4)


def test_it_is_the_maximum():
    """Karush-Kuhn-Tucker: the gradient mean_t p_tc / sum_j q_j p_tj is 1 where q_c > 0, and nowhere more; and no other
    weights are better. Log-probabilities as far down as those of a vocabulary of 50,000."""
    rng = np.random.default_rng(0)
    log_chances = rng.normal(-8, 2, (4000, 6)).astype(np.float32) - 300 * (rng.random((4000, 1)) < 0.01)
    log_chances[:, 4] -= 3
    weights, mean = likeliest_mixture(log_chances)
    wide = log_chances.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    chances = np.exp(wide - top)

    def likelihood(q):
        return (np.log(chances @ q) + top[:, 0]).mean()

    gradient = (chances / (chances @ weights)[:, None]).mean(axis=0)
    assert weights.sum() == pytest.approx(1) and gradient.max() < 1 + 1.1e-4 and weights[4] < 0.01
    np.testing.assert_allclose(gradient[weights > 0.02], 1, atol=5e-3)
    assert mean == pytest.approx(likelihood(weights), abs=1e-6)
    assert all(likelihood(rng.dirichlet(np.ones(6))) < mean for _ in range(200))


def test_losses_of_tokens_add_up_to_those_of_windows(prepared, config):
    from mlx_slm.models.shape import Shape

    store = Store(prepared.data("notes", "train"))
    model = Transformer(Shape.of(config.model, 400, 32))
    model.update(initialise(model.shape, 0))
    windows = np.array([7, 2, 30, 31, 5])
    losses, lengths = Scorer(model).token_nll(store, windows), store.lengths(windows)
    assert len(losses) == lengths.sum() and losses.min() > 0
    sums = np.add.reduceat(losses.astype(np.float64), np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    np.testing.assert_allclose(sums, Scorer(model).window_nll(store, windows), rtol=1e-6)


@pytest.mark.parametrize("source", ["pn", "mix"])
def test_the_command_and_the_run_that_takes_them(with_experts, source, tmp_path, capsys):
    workspace = copy_of(with_experts, tmp_path / "w")
    command = ("weigh", "--domain", "notes", "--from", source)
    code, out, err = call(capsys, workspace, *command, "--json")
    assert code == 0, err
    learnt = json.loads(out)
    k = find_run(workspace, source).record["inputs"]["k"]
    weights = read_weights(workspace.results / f"weights-notes-{source}.yaml", k)
    assert learnt["k"] == k and weights.sum() == pytest.approx(1) and (weights >= 0).all()
    assert learnt["nll"] <= learnt["best_expert_nll"] + 1e-4, "the best expert alone is one of the mixtures"
    taking = ("pretrain", "--method", "is", "--weights", learnt["path"], "--k", str(k), "--name", "by-weights")
    code, _, err = call(capsys, workspace, *taking)
    assert code == 0, err
    drawn = find_run(workspace, "by-weights").importance()
    np.testing.assert_allclose(drawn["distribution"], weights, atol=1e-6)
    code, _, err = call(capsys, workspace, *taking[:-4], "--k", str(k + 1), "--name", "other")
    assert code == 1 and f"of {k} clusters, not of {k + 1}: give --k {k}" in err and err.count("\n") == 1
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(yaml.safe_load(open(learnt["path"])) | {"clusters": "0" * 64}))
    code, _, err = call(capsys, workspace, *taking[:4], str(other), *taking[5:-1], "other")
    assert code == 1 and "its clusters are gone" in err and err.count("\n") == 1


def test_what_has_no_experts(with_experts, capsys):
    code, _, err = call(capsys, with_experts, "weigh", "--domain", "notes", "--from", "slm")
    assert code == 1 and "run slm has no experts" in err and err.count("\n") == 1


def test_a_file_that_is_none(tmp_path):
    file = tmp_path / "w.yaml"
    file.write_text("k: 3\nweights: {0: 1, 5: 1}\n")
    with pytest.raises(SlmError, match="5: 1: expected a cluster from 0 to 2"):
        read_weights(file, 3)
    file.write_text("weights: 5\n")
    with pytest.raises(SlmError, match="of None clusters"):
        read_weights(file, 3)
    shutil.rmtree(tmp_path)

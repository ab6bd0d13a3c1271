"""The methods as one list, and one more that nothing else in the package knows."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import call, copy_of
from methods.soup import Soup
from mlx.utils import tree_flatten

from mlx_slm.cli import run
from mlx_slm.config.files import dump_config
from mlx_slm.config.schema import Grid, StudyConfig
from mlx_slm.errors import SlmError
from mlx_slm.methods import METHODS, find_method
from mlx_slm.methods.base import Models, Rows, Trains
from mlx_slm.study.grid import cells
from mlx_slm.training.checkpoint import load_weights
from mlx_slm.training.find import find_run
from mlx_slm.training.runs import open_expert


def test_what_the_methods_say():
    """The paper's table of methods (section 2): what is trained, on which rows, how its cost is shared."""
    said = {method.name: (method.trains, method.rows, method.is_per_domain, method.section) for method in METHODS}
    small, large, network = Trains
    assert said == {
        "slm": (small, Rows.GENERIC, False, None),
        "nopt": (small, Rows.NONE, True, None),
        "is": (small, Rows.DOMAIN, True, "clusters"),
        "cis": (small, Rows.DOMAIN, True, "clusters"),
        "pn": (network, Rows.CLUSTER, False, "projection"),
        "mix": (small, Rows.CLUSTER, False, "mixture"),
        "d": (small, Rows.NONE, False, None),
        "llm": (large, Rows.GENERIC, False, None),
        "lora": (large, Rows.NONE, False, None),
    }
    assert [method.name for method in METHODS if method.pretrains] == ["slm", "is", "cis", "pn", "mix", "llm"]
    assert len({method.label for method in METHODS}) == len({method.color for method in METHODS}) == len(METHODS)
    assert find_method("pn").selects[0] == "histogram" and find_method("mix").selects[0] == "frequent"
    with pytest.raises(SlmError, match=r"no method 'npot', did you mean 'nopt'|no method 'npot'.*nopt"):
        find_method("npot")


def test_memory_and_flops_follow_from_the_models(expert_config):
    models = Models.of(expert_config)
    memory = {method.name: method.memory(models) for method in METHODS}
    assert memory["slm"] == memory["is"] == memory["mix"] == memory["nopt"] < memory["lora"] < memory["llm"]
    assert memory["d"] == max(memory["llm"], memory["slm"] + 4 * models.large.num_parameters)
    flops = {method.name: method.flops_per_token(models) for method in METHODS}
    assert flops["pn"] == models.network.flops_per_token(8 * 32 / 2), "8 rows of 32 tokens, 2 clusters a step"
    assert flops["slm"] < flops["pn"] and flops["llm"] == models.large.flops_per_token


@pytest.fixture
def own(prepared, expert_config, tmp_path, monkeypatch):
    """A workspace to write into, and the soup among the methods."""
    monkeypatch.setattr("mlx_slm.methods.METHODS", [*METHODS, Soup()])
    monkeypatch.setattr("mlx_slm.planning.plan.METHODS", [*METHODS, Soup()])
    monkeypatch.setattr("mlx_slm.planning.plan.calibrated_speed", lambda *_: 1000.0)
    workspace = copy_of(prepared, tmp_path / "w")
    grid = Grid(methods=["slm", "soup"], budgets=[1024], domains=["notes"], domain_tokens=[2000])
    workspace.config_file.write_text(dump_config(expert_config.model_copy(update={"study": StudyConfig(grids=[grid])})))
    return workspace


def test_one_more_method_is_one_file(own, expert_config, capsys):
    assert run(["pretrain", "--help"]) == 0 and "average of a hard mixture" in " ".join(capsys.readouterr().out.split())
    code, out, err = call(capsys, own, "pretrain", "--method", "soup", "--json")
    assert code == 0, err
    assert json.loads(out)["model"] == str(own.model("soup"))
    experts = [dict(tree_flatten(open_expert(find_run(own, "soup-ingredients"), i).weights())) for i in range(4)]
    cooked = dict(tree_flatten(load_weights(own.run("soup"), 1)))
    rate = expert_config.training.learning_rate
    for name, value in cooked.items():
        average = np.mean([np.array(expert[name]) for expert in experts], axis=0)
        assert mx.abs(value - mx.array(average)).max().item() < 1.1 * rate, "a step of Adam moves by the rate"
    code, out, err = call(capsys, own, "specialize", "--domain", "notes", "--from", "soup", "--tokens", "2k")
    assert code == 0 and own.model("notes-soup-2k").exists(), err
    code, out, err = call(capsys, own, "plan", "--generic-hours", "1", "--json", "--set", "training.steps=12")
    rows = {row["method"]: row for row in json.loads(out)["methods"]}
    assert code == 0 and rows["soup"]["total_hours"] == rows["slm"]["total_hours"]


def test_a_study_compares_it_with_the_others(own, capsys):
    code, _, err = call(capsys, own, "study", str(own.config_file), "--yes")
    assert code == 0, err
    tables = (own.results / "config.md").read_text()
    assert "| SLM | 1024 |" in tables and "| SLM-soup, k = 4 | 1024 |" in tables


def test_a_study_of_a_method_that_there_is_not(own, expert_config):
    grid = Grid(methods=["soop"], budgets=[1024], domains=["notes"])
    with pytest.raises(SlmError, match="no method 'soop'"):
        cells(expert_config.model_copy(update={"study": StudyConfig(grids=[grid])}))

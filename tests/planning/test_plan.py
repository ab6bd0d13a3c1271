"""`plan`: useful before anything was trained, and from recorded runs after."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import small_config

from mlx_slm.cli import run
from mlx_slm.config.files import dump_config
from mlx_slm.config.schema import ModelConfig, ProjectionConfig
from mlx_slm.errors import SlmError
from mlx_slm.evaluation.evaluate import evaluate
from mlx_slm.machine import runtime
from mlx_slm.methods import METHODS
from mlx_slm.methods.requests import Pretraining, Specialisation
from mlx_slm.models.shape import Shape
from mlx_slm.planning import plan as module
from mlx_slm.planning.plan import Budgets, decoding_speed, make_plan
from mlx_slm.project import Project
from mlx_slm.stages.pretrain import pretrain
from mlx_slm.stages.specialize import specialize
from mlx_slm.storage.workspace import Workspace
from mlx_slm.training.find import find_run


@pytest.fixture
def plan_config():
    return small_config(large=ModelConfig(family="gpt2", num_layers=2, dims=96, num_heads=4))


@pytest.fixture
def measured(monkeypatch):
    """1,000 tokens a second, whatever the machine."""
    monkeypatch.setattr(module, "calibrated_speed", lambda *_: 1000.0)


TWO = ProjectionConfig(k=2, h=2, clusters_per_step=2)


def rows_of(result) -> dict:
    return {row["method"]: row for row in result["methods"]}


def test_before_anything_was_trained(plan_config, measured, tmp_path, capsys):
    workspace = Workspace(tmp_path / "w")
    workspace.root.mkdir()
    workspace.config_file.write_text(dump_config(plan_config))
    arguments = ["plan", "--workspace", str(workspace.root), "--generic-hours", "10", "--domain-tokens", "1M", "--json"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    rows = rows_of(found)
    assert list(rows) == [method.name for method in METHODS] and found["recommended"] == "is" and found["reason"]
    keys = {"method", "generic_hours", "specialization_hours", "total_hours", "inference_parameters", "memory_gb"}
    assert all(set(row) >= keys | {"fits", "perplexity", "source"} for row in rows.values())
    small, large = (Shape.of(section, 400, 32) for section in (plan_config.model, plan_config.large))
    hours = 30 * 4 * 32 / 1000 / 3600
    assert rows["slm"]["specialization_hours"] == pytest.approx(hours), "30 steps of 4 rows of 32 tokens"
    assert rows["llm"]["specialization_hours"] == pytest.approx(hours * large.flops_per_token / small.flops_per_token)
    assert rows["is"]["total_hours"] == pytest.approx(2 + hours)
    assert rows["pn"]["total_hours"] == pytest.approx(10 + hours)
    assert rows["llm"]["inference_parameters"] == large.num_parameters and not rows["llm"]["fits"]
    assert rows["slm"]["source"] == "paper" and rows["slm"]["perplexity"] == 18.2 and rows["is"]["perplexity"] is None
    assert rows["lora"]["memory_gb"] < rows["llm"]["memory_gb"]
    seen = {name: row["pretraining_tokens"] for name, row in rows.items()}
    assert seen["slm"] == seen["mix"] == pytest.approx(36e6) and seen["is"] == pytest.approx(7.2e6), (
        "10 and 2 hours at 1,000 tokens/s"
    )
    assert seen["llm"] == pytest.approx(seen["slm"] * small.flops_per_token / large.flops_per_token, abs=1)
    assert seen["pn"] < seen["slm"] and seen["d"] is None and seen["nopt"] is None


def test_budgets_decide(plan_config, measured, tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "w")

    def recommended(**budgets):
        found = make_plan(Project(workspace, plan_config), Budgets(10, domain_tokens=100_000, **budgets))
        row = rows_of(found)[found["recommended"]]
        assert row["fits"] and row["against"] is None, "what is recommended can be done"
        return found["recommended"]

    assert [recommended(domains=count) for count in (1, 4, 16, 18)] == ["is", "cis", "cis", "pn"]
    assert recommended(domains=1, specialization_hours=1) == "cis", "half an hour of the two"
    assert recommended(domains=1, specialization_hours=0.4) == "pn"
    assert recommended(domains=1, inference_parameters=10**9) == "llm"
    monkeypatch.setattr(runtime, "memory_bytes", lambda: 10 << 20)
    assert recommended(domains=18) == "mix", "the network does not fit 10 MB"
    assert recommended(domains=6, specialization_hours=0.4) == "mix"
    with pytest.raises(SlmError, match=r"no method fits: it takes .* hours a domain, 1e-09 are given"):
        recommended(specialization_hours=1e-9)
    with pytest.raises(SlmError, match="no such set is prepared"):
        make_plan(Project(workspace, plan_config), Budgets(10), domain="pubmedd")


def test_rates_come_from_recorded_runs_of_the_same_shape(plan_config, prepared, tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "w")
    shutil.copytree(prepared.root, workspace.root)
    other, plan_config = plan_config, plan_config.model_copy(update={"projection": TWO})
    for method in ("slm", "pn"):
        one = pretrain(Project(workspace, plan_config), Pretraining(method))
        one.record["seconds"] = 100.0 if method == "slm" else 150.0
        one.save()
    monkeypatch.setattr(module, "calibrated_speed", lambda *_: pytest.fail("measured although there are runs"))
    found = make_plan(Project(workspace, plan_config), Budgets(1))
    positions = find_run(workspace, "slm").record["step"] * 8 * 32
    assert found["rates"]["slm"] == pytest.approx(1e9 * 100 / positions / 3600)
    assert found["rates"]["pn"] == pytest.approx(1.5 * found["rates"]["slm"])
    assert found["rates_from"]["slm"] == "run slm" and found["rates_from"]["llm"] == "by FLOPs from slm"
    assert make_plan(Project(workspace, other), Budgets(1))["rates_from"]["pn"] == "by FLOPs from slm", "another h"


def test_perplexities_are_those_of_the_domain_and_its_size(plan_config, prepared, measured, tmp_path):
    workspace = Workspace(tmp_path / "w")
    shutil.copytree(prepared.root, workspace.root)
    pretrain(Project(workspace, plan_config), Pretraining("slm"))
    for tokens, more in ((4000, {}), (2000, {}), (4000, {"lora": 2})):
        tuned = specialize(
            Project(workspace, plan_config), Specialisation("notes", source="slm", tokens=tokens, **more)
        )
        row = evaluate(Project(workspace, plan_config), [tuned.name], domains=["notes"], split="test")["results"][0]
        found = rows_of(make_plan(Project(workspace, plan_config), Budgets(1, domain_tokens=tokens), domain="notes"))
        method = "lora" if more else "slm"
        assert (found[method]["perplexity"], found[method]["source"]) == (row["perplexity"], "run")
    found = rows_of(make_plan(Project(workspace, plan_config), Budgets(1, domain_tokens=3000), domain="notes"))
    assert found["slm"]["source"] == "paper" and found["is"]["source"] is None
    sizes = {2_000_000: (18.2, 1_000_000), 4_000_000: (14.8, 8_000_000), 10**9: (12.0, 64_000_000)}
    for tokens, expected in sizes.items():
        row = rows_of(make_plan(Project(workspace, plan_config), Budgets(1, domain_tokens=tokens)))["slm"]
        assert (row["perplexity"], row["perplexity_tokens"]) == expected, "the nearest of the paper's sizes"
    with open(workspace.results / "evaluations.jsonl", "a") as file:
        file.write('{"model": "cut o')
    assert make_plan(Project(workspace, plan_config), Budgets(1, domain_tokens=4000), domain="notes")


def test_the_speed_of_writing_decides_which_models_may_be_run(plan_config, measured, tmp_path, monkeypatch):
    clock = iter((0, 2))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert decoding_speed(Shape.of(plan_config.model, 400, 32), tokens=8) == 4.0, "8 tokens in 2 seconds"
    large = Shape.of(plan_config.large, 400, 32)
    monkeypatch.setattr(module, "decoding_speed", lambda shape: 10.0 if shape == large else 100.0)
    for speed, method in ((5, "llm"), (50, "is")):
        found = make_plan(Project(Workspace(tmp_path / "w"), plan_config), Budgets(10, inference_speed=speed))
        assert found["recommended"] == method
    with pytest.raises(SlmError, match="--inference-speed 500: the small model writes 100 tokens/s"):
        make_plan(Project(Workspace(tmp_path / "w"), plan_config), Budgets(10, inference_speed=500))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--inference-parameters", "1M", "--inference-speed", "3"), 2, "not both"),
        ((), 2, "give --generic-hours"),
        (("--generic-hours", "1", "--inference-parameters", "100"), 1, "the inference budget admits 100"),
    ],
)
def test_wrong_budgets(arguments, code, message, plan_config, measured, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(dump_config(plan_config))
    found = run(["plan", "--workspace", str(tmp_path / "w"), "--config", str(tmp_path / "c.yaml"), *arguments])
    assert found == code and message in capsys.readouterr().err

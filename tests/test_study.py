"""A study on a little text: every method, resumable, its tables by hand."""

import json
import math
import shutil
import statistics

import pytest
from conftest import call, small_config

from mlx_slm import study as module
from mlx_slm.config import ClustersConfig, MixtureConfig, ModelConfig, ProjectionConfig, StudyConfig
from mlx_slm.config_files import dump_config
from mlx_slm.costs import Cost
from mlx_slm.errors import SlmError
from mlx_slm.models.transformer import Shape
from mlx_slm.report import Report
from mlx_slm.study import cells, read_rows, run_study
from mlx_slm.study_report import cost_of, grouped, label, macro, markdown
from mlx_slm.training.runs import find_run
from mlx_slm.workspace import Workspace

METHODS = ["slm", "nopt", "is", "pn", "mix", "d", "llm", "lora"]


@pytest.fixture(scope="module")
def study_config():
    base = small_config()
    return small_config(
        large=ModelConfig(family="gpt2", num_layers=2, dims=48, num_heads=4),
        clusters=ClustersConfig(encoder="lsi", dims=8, k=4),
        projection=ProjectionConfig(k=4, h=3, clusters_per_step=2),
        mixture=MixtureConfig(k=4),
        finetuning=base.finetuning.model_copy(update={"max_steps": 6}),
        study=StudyConfig(
            methods=METHODS,
            budgets=[1024, 2048],
            domains=["notes"],
            domain_tokens=[2000, 4000],
            sampling_clusters=[4],
            selects=["frequent", "histogram"],
            lora_rank=2,
        ),
    )


@pytest.fixture(scope="module")
def done(prepared, study_config, tmp_path_factory) -> Workspace:
    """A workspace with a finished study `grid`. Do not write into it."""
    workspace = Workspace(tmp_path_factory.mktemp("study") / "w")
    shutil.copytree(prepared.root, workspace.root)
    run_study(workspace, study_config, "grid", Report())
    return workspace


def test_the_grid(study_config):
    names = [cell.name for cell in cells(study_config)]
    assert len(names) == len(set(names))
    by_method = {m: sum(cell.method == m for cell in cells(study_config)) for m in METHODS}
    assert by_method == {"slm": 4, "nopt": 2, "is": 4, "pn": 8, "mix": 2, "d": 4, "llm": 4, "lora": 4}
    assert "pn-histogram-2048-notes-4k-s0" in names and "is-k4-1024-notes-2k-s0" in names
    with pytest.raises(SlmError, match=r"study\.domains is empty"):
        list(cells(small_config()))


def test_one_pretraining_serves_all_budgets(done, study_config):
    rows = {row["cell"]: row for row in read_rows(done.results / "grid.jsonl")}
    assert len(rows) == 32
    assert find_run(done, "slm-s0").record["step"] == 8 and find_run(done, "slm-s0@1024").weights_step() == 4
    early, late = rows["slm-1024-notes-4k-s0"], rows["slm-2048-notes-4k-s0"]
    assert early["pretrained"]["nll"] > late["pretrained"]["nll"]
    assert late["pretraining"]["flops"] == pytest.approx(2 * early["pretraining"]["flops"], rel=0.05)
    shape = Shape.of(study_config.model, 400, 32)
    assert late["specialization"]["flops"] == 6 * 4 * 32 * shape.flops_per_token
    assert late["specialized"]["perplexity"] == pytest.approx(math.exp(late["specialized"]["nll"]))
    assert rows["nopt-notes-4k-s0"]["pretraining"] is None
    teacher = rows["llm-2048-notes-4k-s0"]["specialization"]["flops"]
    assert rows["d-2048-notes-4k-s0"]["specialization"]["flops"] > teacher + late["specialization"]["flops"]
    both = late["pretraining"]["flops"] + rows["llm-2048-notes-4k-s0"]["pretraining"]["flops"]
    assert rows["d-2048-notes-4k-s0"]["pretraining"]["flops"] == pytest.approx(both), "student and teacher"
    assert rows["pn-frequent-2048-notes-4k-s0"]["selection"]["select"] == "frequent"


def test_a_study_that_was_cut_off_goes_on_and_gives_the_same_tables(done, study_config, tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "w")
    shutil.copytree(done.root, workspace.root)
    file = workspace.results / "grid.jsonl"
    whole = file.read_text()
    rows = read_rows(file)
    file.write_text("".join(line + "\n" for line in whole.splitlines()[:20]) + '{"cell": "cut o')
    worked = []
    real = module._work
    monkeypatch.setattr(module, "_work", lambda *a: worked.append(a[2].name) or real(*a))
    again = run_study(workspace, study_config, "grid", Report())
    assert len(worked) == 12
    assert markdown(again, "grid") == markdown(rows, "grid")
    assert run_study(workspace, study_config, "grid", Report()) == again and len(worked) == 12


def test_what_changes_a_cell_does_it_again(done, study_config, tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "w")
    shutil.copytree(done.root, workspace.root)
    worked = []
    monkeypatch.setattr(module, "_work", lambda *a: worked.append(a[2].name) or {"pretrained": None})
    for change in ({"lora_rank": 3}, {"budgets": [1024]}):
        worked.clear()
        study = study_config.study.model_copy(update=change)
        run_study(workspace, study_config.model_copy(update={"study": study}), "grid", Report())
        assert worked, change
    rows = read_rows(workspace.results / "grid.jsonl")
    assert rows[:32] == read_rows(done.results / "grid.jsonl"), "what was there is kept"
    with pytest.raises(SlmError, match=r"study\.lora_rank 49 is more than large\.dims 48"):
        study = study_config.study.model_copy(update={"lora_rank": 49})
        run_study(workspace, study_config.model_copy(update={"study": study}), "grid", Report())
    with pytest.raises(SlmError, match="unknown set 'nots'"):
        study = study_config.study.model_copy(update={"domains": ["nots"]})
        run_study(workspace, study_config.model_copy(update={"study": study}), "grid", Report())


def test_tables_by_hand(done):
    rows = read_rows(done.results / "grid.jsonl")
    nll = {"a": 1.0, "b": 3.0}
    made = [
        {"seed": seed, "specialized": {"nll": value + seed}, "pretrained": None}
        for seed in (0, 1)
        for value in nll.values()
    ]
    mean, half, seeds = macro(made, "specialized")
    assert (mean, half, seeds) == (
        pytest.approx((math.e**2 + math.e**3) / 2),
        pytest.approx((math.e**3 - math.e**2) / 2),
        2,
    )
    assert macro(made, "pretrained") is None
    of_is = [row for row in rows if row["method"] == "is" and row["budget"] == 2048 and row["domain_tokens"] == 4000]
    seconds = statistics.fmean(row["pretraining"]["seconds"] + row["specialization"]["seconds"] for row in of_is)
    assert cost_of(of_is) == Cost(0.0, pytest.approx(seconds / 3600))
    text = markdown(rows, "grid")
    one = next(row for row in rows if row["cell"] == "pn-histogram-2048-notes-4k-s0")
    line = next(line for line in text.split("## Pretraining on 2048")[1].splitlines() if "SLM-pn, histogram" in line)
    assert line.endswith(f"{one['specialized']['perplexity']:.2f} |")
    assert list(grouped(rows, label)) == [
        "SLM",
        "SLM-nopt",
        "SLM-is, k = 4",
        "SLM-pn, frequent",
        "SLM-pn, histogram",
        "SLM-mix, frequent",
        "SLM-d",
        "LLM",
        "LLM-lora",
    ]


def test_the_command(done, study_config, tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(dump_config(study_config))
    workspace = Workspace(tmp_path / "w")
    shutil.copytree(done.root, workspace.root)
    code, out, err = call(capsys, workspace, "study", str(tmp_path / "grid.yaml"), "--json")
    assert code == 0, err
    found = json.loads(out)
    assert len(found["rows"]) == 32 and len(found["figures"]) == 3
    assert (workspace.results / "grid.md").read_text().startswith("# grid")
    code, _, err = call(capsys, workspace, "study", "nothing")
    assert code == 1 and "--config nothing: no such file" in err

"""A study on a little text: every method, resumable, shared by processes, its tables by hand."""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
from conftest import call, copy_of, small_config
from pydantic import ValidationError

from mlx_slm.clustering.clusters import Clusters
from mlx_slm.config.files import dump_config, find_config, load_config
from mlx_slm.config.schema import ClustersConfig, Grid, MixtureConfig, ModelConfig, ProjectionConfig, StudyConfig
from mlx_slm.errors import SlmError
from mlx_slm.machine import runtime
from mlx_slm.methods.costs import Cost
from mlx_slm.models.shape import Shape
from mlx_slm.project import Project
from mlx_slm.storage.records import append_json
from mlx_slm.storage.workspace import Workspace
from mlx_slm.study.cell import Study
from mlx_slm.study.figures import draw
from mlx_slm.study.grid import budgets_of, cells
from mlx_slm.study.run import as_now, read_rows, run_study
from mlx_slm.study.tables import cost_of, grouped, label, macro, markdown
from mlx_slm.training.find import find_run

METHODS = ["slm", "nopt", "is", "pn", "mix", "d", "llm", "lora"]
ALL = Grid(
    methods=METHODS, budgets=[1024, 2048], domains=["notes"], domain_tokens=[4000], selects=["frequent", "histogram"]
)
MIXED = Grid(
    methods=["is", "cis"],
    budgets=[512],
    shared_budget=1024,
    domains=["notes"],
    domain_tokens=[4000],
    variant="mixed",
    settings={"clusters.domain_share": 0.25},
)
SHORT = Grid(
    methods=["slm"],
    budgets=[1024],
    domains=["notes"],
    domain_tokens=[4000],
    variant="short",
    settings={"finetuning.max_steps": 2},
)
MORE = Grid(methods=["slm", "is"], budgets=[2048], domains=["notes"], domain_tokens=[2000, 4000], clusters=[3, 4])


@pytest.fixture(scope="module")
def study_config():
    base = small_config()
    return small_config(
        large=ModelConfig(family="gpt2", num_layers=2, dims=48, num_heads=4),
        clusters=ClustersConfig(encoder="lsi", dims=8, k=4),
        projection=ProjectionConfig(k=4, h=4, clusters_per_step=2),
        mixture=MixtureConfig(k=4),
        finetuning=base.finetuning.model_copy(update={"max_steps": 6}),
        study=StudyConfig(grids=[ALL, MORE, MIXED, SHORT], lora_rank=2),
    )


def changed(config, **study):
    return config.model_copy(update={"study": config.study.model_copy(update=study)})


@pytest.fixture(scope="module")
def done(prepared, study_config, tmp_path_factory) -> Study:
    """A finished study `grid`. Do not write into its workspace."""
    workspace = Workspace(tmp_path_factory.mktemp("study") / "w")
    shutil.copytree(prepared.root, workspace.root)
    study = Study(Project(workspace, study_config), "grid")
    run_study(study)
    return study


@pytest.fixture
def copy(done, tmp_path) -> Workspace:
    """The finished study's workspace, to write into."""
    return copy_of(done.workspace, tmp_path / "w")


def without_clocks(row: dict) -> dict:
    """A row without what depends on the machine's speed."""
    timed = {
        key: {k: v for k, v in row[key].items() if k != "seconds"}
        for key in ("specialization", "pretraining", "shared")
    }
    selection = row["selection"] and {key: value for key, value in row["selection"].items() if key != "cost"}
    return row | timed | {"selection": selection}


def test_the_grid(study_config):
    found = cells(study_config)
    names = [cell.name for cell in found]
    assert len(names) == len(set(names)) == 23
    counts = {m: sum(cell.method == m for cell in found) for m in METHODS}
    assert counts == {"slm": 4, "nopt": 1, "is": 6, "pn": 4, "mix": 1, "d": 2, "llm": 2, "lora": 2}, "slm-2048 once"
    mixed = "k4-512-mixed-notes-4k-s0", "k4-512-from1024-mixed-notes-4k-s0"
    assert names[-3:] == [f"is-{mixed[0]}", f"cis-{mixed[1]}", "slm-1024-short-notes-4k-s0"]
    assert {"pn-k4-histogram-2048-notes-4k-s0", "is-k3-2048-notes-2k-s0", "d-1024-t1024-notes-4k-s0"} <= set(names)
    sampled = {f"is-k{k}-notes-{size}-s0": [2048] for k in (3, 4) for size in ("2k", "4k")}
    sampled["is-k4-notes-4k-s0"] = [1024, 2048]
    assert budgets_of(found) == {
        **{name: [1024, 2048] for name in ("slm-s0", "pn-k4-s0", "llm-s0")},
        "mix-k4-s0": [2048],
        **sampled,
        "is-k4-notes-4k-clusters.domain_share_0.25-s0": [512],
        "cis-from1024-k4-notes-4k-clusters.domain_share_0.25-s0": [512],
    }
    dims = [
        ALL.model_copy(update={"methods": [m], "variant": part, "settings": {f"{part}.dims": 64}})
        for m, part in (("slm", "model"), ("slm", "large"), ("llm", "large"))
    ]
    trunks = [cell.trunk(cell.method) for cell in cells(changed(study_config, grids=dims))]
    assert set(trunks) == {"slm-model.dims_64-s0", "slm-s0", "llm-large.dims_64-s0"}, "what does not concern it is left"
    several = [
        ALL.model_copy(update={"methods": ["mix"], "budgets": [2048]}),
        ALL.model_copy(
            update={"methods": ["mix"], "budgets": [1024], "variant": "a", "settings": {"training.cooldown": 0.1}}
        ),
    ]
    assert [cell.budget for cell in cells(changed(study_config, grids=several))] == [2048, 1024], "two mixtures"
    taught = cells(changed(study_config, grids=[ALL.model_copy(update={"methods": ["d"], "teacher_budget": 512})]))
    assert [cell.pretrained for cell in taught] == [{"slm": 1024, "llm": 512}, {"slm": 2048, "llm": 512}]
    two = [ALL.model_copy(update={"methods": ["mix"], "budgets": [budget]}) for budget in (1024, 2048)]
    assert [cell.budget for cell in cells(changed(study_config, grids=two))] == [2048], "one mixture, at its own budget"
    with pytest.raises(SlmError, match=r"study\.grids is empty"):
        cells(small_config())


def test_a_variant_is_another_training_where_its_settings_concern_it(done):
    rows, workspace = read_rows(done), done.workspace
    continued = find_run(workspace, "grid-cis-from1024-k4-notes-4k-clusters.domain_share_0.25-s0")
    assert continued.record["inputs"]["importance"]["domain_share"] == 0.25 and continued.record["step"] == 2
    assert find_run(workspace, "grid-slm-1024-short-notes-4k-s0").record["inputs"]["from"]["run"] == "grid-slm-s0"
    slm, sampled = rows["slm-1024-notes-4k-s0"], rows["is-k4-512-mixed-notes-4k-s0"]
    row = rows["cis-k4-512-from1024-mixed-notes-4k-s0"]
    assert row["shared"]["flops"] == slm["pretraining"]["flops"], "one generic model for all domains"
    assert row["pretraining"]["flops"] == slm["pretraining"]["flops"] + sampled["pretraining"]["flops"]
    assert row["changes"] == [["clusters.domain_share", 0.25]] and label(row) == "SLM-cis, k = 4, after 1024, mixed"
    assert cost_of([row], "flops").total(3) == pytest.approx(
        row["shared"]["flops"] + 3 * (sampled["pretraining"]["flops"] + row["specialization"]["flops"])
    )


def test_variants_that_make_no_sense(done, study_config):
    with pytest.raises(ValidationError, match="a grid with settings needs a variant"):
        Grid(methods=["slm"], domains=["notes"], settings={"training.cooldown": 0.1})
    for settings, message in (
        ({"training.seed": 5}, "training.seed is no setting of a variant"),
        ({"clusters.k": 3}, "clusters.k is no setting of a variant"),
        ({"study.test_tokens": 9}, "study.test_tokens is no setting"),
        ({"projection.layers": [1]}, r"projection.layers is \[1\]: give a single value"),
    ):
        with pytest.raises(ValidationError, match=message):
            Grid(methods=["slm"], domains=["notes"], variant="a", settings=settings)
    named = SHORT.model_copy(update={"variant": "fast/er"})
    taught = ALL.model_copy(update={"methods": ["d"], "variant": "a", "settings": {"finetuning.max_steps": 3}})
    for grids, message in (([named], "is not a name"), ([taught], "the teachers of method d are fine-tuned with")):
        with pytest.raises(SlmError, match=message):
            Study(Project(done.workspace, changed(study_config, grids=grids)), "grid").prepare()
    other = SHORT.model_copy(update={"settings": {"finetuning.max_steps": 3}})
    wrong = SHORT.model_copy(update={"settings": {"finetuning.mox_steps": 3}})
    for grids, message in (([SHORT, other], "variant short stands for several"), ([wrong], "unknown key.*max_steps")):
        with pytest.raises(SlmError, match=message):
            Study(Project(done.workspace, changed(study_config, grids=grids)), "grid").prepare()


@pytest.mark.parametrize("name", ["study-mini", "study-paper"])
def test_the_shipped_studies_are_grids(name):
    found = cells(load_config(find_config(name)))
    assert {cell.method for cell in found} >= set(METHODS)
    if name == "study-mini":
        assert {cell.seed for cell in found} == {0, 1}


def test_one_pretraining_serves_all_budgets(done, study_config):
    rows, workspace = read_rows(done), done.workspace
    assert len(rows) == 23
    assert find_run(workspace, "grid-slm-s0").record["step"] == 8
    assert find_run(workspace, "grid-slm-s0@1024").weights_step() == 4
    early, late = rows["slm-1024-notes-4k-s0"], rows["slm-2048-notes-4k-s0"]
    assert early["pretrained"]["nll"] > late["pretrained"]["nll"] and early["generic"]["nll"] > late["generic"]["nll"]
    assert late["pretraining"]["flops"] == 2 * early["pretraining"]["flops"]
    shape = Shape.of(study_config.model, 400, 32)
    assert late["pretraining"]["flops"] == 8 * 8 * 32 * shape.flops_per_token
    assert late["specialization"]["flops"] == 6 * 4 * 32 * shape.flops_per_token
    assert late["specialized"]["perplexity"] == pytest.approx(math.exp(late["specialized"]["nll"]))
    record = find_run(workspace, "grid-slm-2048-notes-4k-s0").record
    assert min(ppl for _, ppl in late["curve"]) == pytest.approx(math.exp(record["valid_nll"]), abs=1e-3)
    assert rows["nopt-notes-4k-s0"]["pretraining"]["flops"] == 0
    assert late["shared"] == late["pretraining"]
    assert rows["is-k4-2048-notes-4k-s0"]["shared"]["flops"] == 0, "each domain pays it"
    teacher = rows["llm-2048-notes-4k-s0"]["specialization"]["flops"]
    distilled = rows["d-2048-t2048-notes-4k-s0"]
    assert distilled["specialization"]["flops"] > teacher + late["specialization"]["flops"]
    both = late["pretraining"]["flops"] + rows["llm-2048-notes-4k-s0"]["pretraining"]["flops"]
    assert distilled["pretraining"]["flops"] == both, "student and teacher"
    assert rows["pn-k4-frequent-2048-notes-4k-s0"]["selection"]["select"] == "frequent"
    assert rows["is-k3-2048-notes-2k-s0"]["importance"]["clusters_used"] <= 3


def test_a_study_that_was_killed_goes_on_and_gives_the_same_tables(done, prepared, study_config, tmp_path):
    workspace = Workspace(tmp_path / "w")
    shutil.copytree(prepared.root, workspace.root)
    few = ALL.model_copy(update={"methods": ["slm", "is", "pn", "d"], "selects": ["histogram"]})
    study_config = changed(study_config, grids=[few])
    (tmp_path / "grid.yaml").write_text(dump_config(study_config))
    command = [
        sys.executable,
        "-m",
        "mlx_slm",
        "study",
        str(tmp_path / "grid.yaml"),
        "--workspace",
        str(workspace.root),
    ]
    study = Study(Project(workspace, study_config), "grid")
    for rows in (2, 5):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and (not study.file.exists() or study.file.read_bytes().count(b"\n") < rows):
                time.sleep(0.01)
            assert process.poll() is None, "it was killed at work"
            os.kill(process.pid, signal.SIGKILL)
    with open(study.file, "a") as file:
        file.write('{"cell": "cut o')
    before = len(read_rows(study))
    assert 5 <= before < 8
    again, whole = run_study(study), read_rows(done)
    for row in again:
        assert without_clocks(row) == without_clocks(whole[row["cell"]]), row["cell"]
    assert run_study(study) == again, "and then there is nothing to do"


on_gpu = pytest.mark.skipif(runtime.on_gpu(), reason="several jobs are refused on a GPU")


def test_a_gpu_has_one_job(copy, study_config, report, monkeypatch):
    monkeypatch.setenv("MLX_SLM_AS_GPU", "1")
    with pytest.raises(SlmError, match=r"--jobs 2: there is one GPU.*leave --jobs out"):
        run_study(Study(Project(copy, study_config, report), "grid"), 2, ["study", "grid"])


@on_gpu
def test_processes_share_the_cells(prepared, study_config, done, tmp_path, capsys):
    workspace = Workspace(tmp_path / "w")
    shutil.copytree(prepared.root, workspace.root)
    few = ALL.model_copy(update={"methods": ["slm", "llm", "d"], "teacher_budget": 2048})
    (tmp_path / "grid.yaml").write_text(dump_config(changed(study_config, grids=[few])))
    code, out, err = call(capsys, workspace, "study", str(tmp_path / "grid.yaml"), "--jobs", "2", "--json")
    assert code == 0 and "a job ended before its time" not in err, err
    lines = (workspace.results / "grid.jsonl").read_text().splitlines()
    assert len(lines) == 6 and len(json.loads(out)["rows"]) == 6, "each cell once, though both of SLM-d want a teacher"
    whole = read_rows(done)
    shared = [row for row in map(json.loads, lines) if row["cell"] in whole]
    assert len(shared) == 5, "the early student of the late teacher is new"
    for row in shared:
        assert row["specialized"]["nll"] == pytest.approx(whole[row["cell"]]["specialized"]["nll"], rel=1e-5)


@on_gpu
def test_a_job_that_ends_is_told_of_and_the_others_go_on(done, copy, study_config, report):
    study = Study(Project(copy, study_config, report), "grid")
    study.prepare()
    lines = study.file.read_text().splitlines(keepends=True)
    study.file.write_text("".join(lines[:-2]))
    with pytest.raises(SlmError, match=r"2 cells are not done \(.*grid-job[12]\.log: mlx-slm: .*no such file.*goes on"):
        run_study(study, 2, ["study", "nothing"])
    assert len(report.warnings) == 2 and "a job ended before its time" in report.warnings[0]


def test_what_changes_a_cell_does_it_again(copy, study_config, monkeypatch):
    def worked(**study):
        found = []

        def work(self, cell):
            found.append(cell.method)
            row = {"cell": cell.name, "method": cell.method, "settings": self.settings[cell.name]}
            return row | {"pretraining": None, "specialized": {"perplexity": 1.0}}

        monkeypatch.setattr(Study, "work", work)
        run_study(Study(Project(copy, changed(study_config, **study)), "grid"))
        return found

    before = (copy.results / "grid.jsonl").read_text()
    assert worked() == []
    assert worked(lora_rank=3) == ["lora", "lora"]
    shorter = ALL.model_copy(update={"methods": ["slm"], "budgets": [1024]})
    assert worked(grids=[shorter]) == ["slm"], "its run has another horizon"
    more = ALL.model_copy(update={"methods": ["nopt"], "domain_tokens": [2000, 4000]})
    assert worked(grids=[ALL, MORE, more]) == ["nopt"], "a grid more leaves the others as they are"
    assert (copy.results / "grid.jsonl").read_text().startswith(before), "what was there is kept"


def test_a_row_of_before_variants_counts(copy, study_config):
    """Without their keys, and with what SLM-nopt said of its pretraining then."""
    study = Study(Project(copy, study_config), "grid")
    rows = [dict(row) for row in read_rows(study).values() if not row["variant"] and not row["shared_budget"]]
    expected = {row["cell"]: row for row in rows}
    for row in rows:
        for key in ("variant", "changes", "shared_budget", "shared"):
            del row[key]
        row["pretraining"] = None if row["method"] == "nopt" else row["pretraining"]
        whole = as_now(row)
        assert whole["variant"] is None and label(whole)
        assert whole["shared"]["flops"] == (0 if row["method"] in ("is", "nopt") else row["pretraining"]["flops"])
        assert cost_of([whole], "flops").total(1) > 0
    assert len(expected) > 15


def test_names_that_belong_to_other_settings(copy, study_config):
    other = study_config.model_copy(
        update={"training": study_config.training.model_copy(update={"learning_rate": 0.5})}
    )
    with pytest.raises(
        SlmError, match=r"run grid-slm-s0 .*learning_rate .* -> 0\.5.*give the study's file another name"
    ):
        run_study(Study(Project(copy, other), "grid"))
    assert find_run(copy, "grid-slm-s0").finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": 49}, r"study\.lora_rank 49 is more than large\.dims 48"),
        ({"grids": [ALL.model_copy(update={"domains": ["nots"]})]}, "unknown set 'nots'"),
        ({"grids": [ALL.model_copy(update={"domains": ["generic"]})]}, "generic is the generic set, not a domain"),
        ({"grids": [ALL.model_copy(update={"methods": ["mix"], "selects": ["histogram"]})]}, "no cell is left"),
    ],
)
def test_bad_grids(change, message, copy, study_config):
    with pytest.raises(SlmError, match=message):
        run_study(Study(Project(copy, changed(study_config, **change)), "grid"))


def test_a_study_does_not_write_into_the_evaluations(copy, study_config):
    with pytest.raises(SlmError, match="a study cannot be called evaluations"):
        run_study(Study(Project(copy, study_config), "evaluations"))
    study = Study(Project(copy, study_config), "grid")
    append_json(study.file, {"set": "notes", "perplexity": 3.0})
    assert len(run_study(study)) == len(study.cells), "a line of something else is left out"


def test_tables_by_hand(done):
    rows = list(read_rows(done).values())
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
    of_is = [row for row in rows if row["method"] == "is" and (row["budget"], row["k"]) == (2048, 4)]
    seconds = statistics.fmean(row["pretraining"]["seconds"] + row["specialization"]["seconds"] for row in of_is)
    assert cost_of(of_is) == Cost(0.0, pytest.approx(seconds / 3600))
    text = markdown(rows, "grid", done.histograms())
    one = next(row for row in rows if row["cell"] == "pn-k4-histogram-2048-notes-4k-s0")
    line = next(line for line in text.splitlines() if line.startswith("| SLM-pn, k = 4, histogram | 2048 |"))
    flops = one["pretraining"]["flops"] / 1e12
    scores = [f"{one[key]['perplexity']:.1f}" for key in ("generic", "pretrained", "specialized")]
    assert line == f"| SLM-pn, k = 4, histogram | 2048 | {flops:.3g} | {scores[0]} | {scores[1]} | - | {scores[2]} |"
    total = (one["pretraining"]["flops"] + 7 * one["specialization"]["flops"]) / 1e12
    line = [line for line in text.splitlines() if line.startswith("| SLM-pn, k = 4, histogram | 2048 |")][1]
    assert line.split(" | ")[-2] == f"{total:.3g}", "Eq. 1 for 7 domains"
    clusters = Clusters(done.workspace, 3).assigned("notes", "train").tokens
    line = next(line for line in text.splitlines() if line.startswith("| notes | 0.")).split(" | ")
    assert float(line[1]) == pytest.approx(clusters.max() / clusters.sum(), abs=0.01), "Table 9, k = 3"
    assert 0 < float(line[3]) <= math.log(3), "Table 10, k = 3"
    assert set(grouped(rows, label)) == {
        "SLM",
        "SLM-nopt",
        "SLM-is, k = 4",
        "SLM-is, k = 3",
        "SLM-is, k = 4, mixed",
        "SLM-cis, k = 4, after 1024, mixed",
        "SLM, short",
        "SLM-pn, k = 4, frequent",
        "SLM-pn, k = 4, histogram",
        "SLM-mix, k = 4, frequent",
        "SLM-d, teacher 1024",
        "SLM-d, teacher 2048",
        "LLM",
        "LLM-lora",
    }


def test_a_budget_that_its_run_has_no_checkpoint_of(copy, study_config):
    between = ALL.model_copy(update={"methods": ["slm"], "budgets": [768, 2048]})
    with pytest.raises(SlmError, match=r"run grid-slm-s0 was finished without a checkpoint at 768 tokens: take"):
        run_study(Study(Project(copy, changed(study_config, grids=[between])), "grid"))


def test_more_clusters_a_step_than_rows(copy, study_config):
    many = study_config.projection.model_copy(update={"clusters_per_step": 16})
    with pytest.raises(SlmError, match=r"projection\.clusters_per_step 16 is more than the 8 rows of a step"):
        run_study(Study(Project(copy, study_config.model_copy(update={"projection": many})), "wide"))


def test_nothing_is_trained_before_all_can_be(copy, study_config):
    odd = study_config.training.model_copy(update={"batch_rows": 9})
    config = changed(study_config.model_copy(update={"training": odd}), grids=[ALL])
    with pytest.raises(SlmError, match=r"training\.batch_rows 9 is not a multiple of projection\.clusters_per_step 2"):
        run_study(Study(Project(copy, config), "another"))
    assert not list((copy.root / "runs").glob("another-*"))


def test_figures_and_the_command(copy, study_config, tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(dump_config(study_config))
    code, out, err = call(capsys, copy, "study", str(tmp_path / "grid.yaml"), "--json")
    assert code == 0, err
    found = json.loads(out)
    assert len(found["rows"]) == 23
    names = [os.path.basename(path) for path in found["figures"]]
    assert names == [f"grid-{what}.png" for what in ("tokens", "cost", "domains", "finetuning", "clusters-is")]
    assert (copy.results / "grid.md").read_text().startswith("# grid")
    assert draw(found["rows"][:1], "one", copy.results), "one row is enough"
    code, _, err = call(capsys, copy, "study", "nothing")
    assert code == 1 and "--config nothing: no such file" in err

"""Pretraining, specialisation, export and the commands around them, on a small real set."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import call, write_jsonl

from mlx_slm.cli import run
from mlx_slm.config.files import dump_config, load_config
from mlx_slm.config.schema import ModelConfig, Recipe
from mlx_slm.errors import SlmError
from mlx_slm.export.model import export_model
from mlx_slm.methods.requests import Pretraining, Specialisation
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import initialise
from mlx_slm.project import Project
from mlx_slm.stages.pretrain import pretrain
from mlx_slm.stages.specialize import specialize
from mlx_slm.storage.workspace import Workspace
from mlx_slm.training.find import find_run
from mlx_slm.training.runs import alone_in


@pytest.fixture(scope="module")
def trained(prepared, config, tmp_path_factory) -> Workspace:
    """A workspace with a pretrained run `slm` and a specialised model. Do not write into it."""
    workspace = Workspace(tmp_path_factory.mktemp("trained") / "w")
    shutil.copytree(prepared.root, workspace.root)
    workspace.config_file.write_text(dump_config(config))
    pretrain(Project(workspace, config), Pretraining("slm"))
    specialize(Project(workspace, config), Specialisation("notes", tokens=4000))
    return workspace


@pytest.fixture
def own(trained, tmp_path) -> Workspace:
    """A copy to write into."""
    shutil.copytree(trained.root, tmp_path / "w")
    return Workspace(tmp_path / "w")


def test_specialising_helps_and_leaves_a_plain_model_directory(trained, capsys):
    code, out, _ = call(
        capsys, trained, "evaluate", "slm", "notes-slm-4k", "--domain", "notes", "--domain", "generic", "--json"
    )
    found = json.loads(out)
    assert code == 0
    results = {(r["model"], r["set"]): r for r in found["results"]}
    assert results["notes-slm-4k", "notes"]["perplexity"] < 0.9 * results["slm", "notes"]["perplexity"]
    one = results["slm", "notes"]
    assert set(one) >= {"model", "set", "split", "tokens", "nll", "stderr", "perplexity", "bits_per_byte"}
    assert one["perplexity"] == pytest.approx(math.exp(one["nll"]))
    assert [set(m) for m in found["macro"]] == [{"model", "sets", "perplexity"}] * 2
    both = [results["slm", name]["nll"] for name in ("notes", "generic")]
    assert found["macro"][0]["perplexity"] == pytest.approx(math.exp(sum(both) / 2))
    assert len((trained.results / "evaluations.jsonl").read_text().splitlines()) >= 4
    files = {path.name for path in trained.model("notes-slm-4k").iterdir()}
    assert files == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "README.md",
        "manifest.json",
    }


def test_the_model_answers_through_mlx_lm(trained, capsys):
    arguments = ("generate", "notes-slm-4k", "--prompt", "The file", "-m", "12")
    code, out, _ = call(capsys, trained, *arguments, "--json")
    found = json.loads(out)
    assert code == 0 and found["tokens"] == 12 and found["prompt"] == "The file" and found["text"]
    code, out, err = call(capsys, trained, *arguments)
    assert out == "The file" + found["text"] + "\n" and "12 tokens" in err


def test_the_best_checkpoint_is_the_model(trained, prepared):
    record = find_run(trained, "notes-slm-4k").record
    lines = (trained.run("notes-slm-4k") / "metrics.jsonl").read_text().splitlines()
    evaluations = [r for r in map(json.loads, lines) if "valid_nll" in r]
    best = min(evaluations, key=lambda r: r["valid_nll"])
    assert (record["best_step"], record["valid_nll"]) == (best["step"], best["valid_nll"])
    manifest = json.loads((trained.model("notes-slm-4k") / "manifest.json").read_text())
    assert manifest["inputs"]["step"] == best["step"] and record["method"] == "slm"


def test_a_finished_run_is_not_trained_again_and_another_configuration_is_refused(own, config, report):
    before = (own.run("slm") / "run.json").stat().st_mtime_ns
    pretrain(Project(own, config, report), Pretraining("slm"))
    assert "run slm is finished (12 steps); --fresh trains it again" in report.lines
    assert (own.run("slm") / "run.json").stat().st_mtime_ns == before
    faster = config.model_copy(update={"training": config.training.model_copy(update={"learning_rate": 1e-2})})
    with pytest.raises(SlmError, match=r"another configuration \(training\.learning_rate 0\.003 -> 0\.01\).* --fresh"):
        pretrain(Project(own, faster, report), Pretraining("slm"))
    assert pretrain(Project(own, faster, report), Pretraining("slm", fresh=True)).record["step"] == 12


def test_a_finished_run_whose_model_is_missing_is_exported_again(own, config, report):
    model = own.model("notes-slm-4k")
    before = (model / "model.safetensors").read_bytes()
    shutil.rmtree(model)
    specialize(Project(own, config, report), Specialisation("notes", tokens=4000))
    assert (model / "model.safetensors").read_bytes() == before


def test_two_processes_do_not_train_one_run(own, config):
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 13})})
    own.run("twice").mkdir()
    with alone_in(own.run("twice")), pytest.raises(SlmError, match="run twice is being trained by another process"):
        pretrain(Project(own, longer), Pretraining("slm", name="twice"))
    assert pretrain(Project(own, longer), Pretraining("slm", name="twice")).finished


def test_tokens_choose_the_recipe_and_the_record_has_the_last_loss(trained, own, config):
    changes = {"learning_rate": None, "max_steps": 3, "recipes": RECIPES}
    recipe = config.model_copy(update={"finetuning": config.finetuning.model_copy(update=changes)})
    made = specialize(Project(own, recipe), Specialisation("notes", tokens=3000))
    assert made.record["inputs"]["recipe"] == {"tokens": 3000, "rate": 0.5, "steps": 7, "learning_rate": 0.0015}
    lines = map(json.loads, (trained.run("slm") / "metrics.jsonl").read_text().splitlines())
    assert find_run(trained, "slm").record["valid_nll"] == [r["valid_nll"] for r in lines if "valid_nll" in r][-1]


RECIPES = [Recipe(tokens=3000, rate=0.5, steps=7), Recipe(tokens=8000, rate=1.0, steps=9)]


def test_a_specialisation_knows_what_it_was_made_from(own, config, report):
    seeded = config.model_copy(update={"training": config.training.model_copy(update={"seed": 1})})
    pretrain(Project(own, seeded, report), Pretraining("slm", fresh=True))
    with pytest.raises(SlmError, match=r"notes-slm-4k was started with another configuration \(from\.identity"):
        specialize(Project(own, seeded, report), Specialisation("notes", tokens=4000))
    other = config.model_copy(update={"data": config.data.model_copy(update={"seed": 5})})
    specialize(Project(own, config, report), Specialisation("notes", tokens=4000, fresh=True))
    with pytest.raises(SlmError, match="another configuration .*windows"):
        specialize(Project(own, other, report), Specialisation("notes", tokens=4000))


def test_windows_longer_than_the_context_are_refused(own, texts, tmp_path, capsys):
    source = write_jsonl(tmp_path / "t.jsonl", texts[:300])
    assert call(capsys, own, "prepare", "wide", str(source), "--set", "data.context_length=64")[0] == 0
    code, _, err = call(capsys, own, "specialize", "--domain", "wide", "--set", "data.context_length=64")
    assert code == 1 and "has a context of 32 tokens, data/wide windows of 64" in err
    code, _, err = call(capsys, own, "evaluate", "slm", "--domain", "wide")
    assert code == 1 and "has a context of 32 tokens" in err


def test_damaged_weights_of_a_finished_run_are_made_again(own, config, report):
    before = own.model("slm") / "model.safetensors"
    kept = before.read_bytes()
    path = own.run("slm") / "checkpoints" / "step-12" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    shutil.rmtree(own.model("slm"))
    with pytest.raises(SlmError, match=r"run slm: .*is damaged.* run the command that made it again"):
        specialize(Project(own, config, report), Specialisation("notes", source="slm", tokens=2000))
    pretrain(Project(own, config, report), Pretraining("slm"))
    assert any("step-12 cannot be used" in warning for warning in report.warnings)
    assert before.read_bytes() == kept


def test_a_refused_configuration_and_a_typo_leave_no_trace(tmp_path, texts, capsys):
    workspace = Workspace(tmp_path / "w")
    assert call(capsys, workspace, "prepare", "generic", str(tmp_path / "gone.txt"))[0] == 1
    assert not workspace.config_file.exists()
    source = write_jsonl(tmp_path / "g.jsonl", texts[:500])
    settings = ("--config", "mini", "--set", "tokenizer.vocab_size=400", "--limit", "50k")
    assert call(capsys, workspace, "prepare", "generic", str(source), *settings)[0] == 0
    kept = load_config(workspace.config_file)
    assert kept.tokenizer.vocab_size == 400 and kept.data.limit is None and kept.data.context_length == 128


def test_evaluate_leaves_out_sets_without_the_split(own, texts, tmp_path, capsys):
    train, valid = (write_jsonl(tmp_path / n, t) for n, t in (("t.jsonl", texts[:50]), ("v.jsonl", texts[50:100])))
    settings = ("--set", "data.test_fraction=0")
    assert call(capsys, own, "prepare", "bare", f"train={train}", f"valid={valid}", *settings)[0] == 0
    code, out, err = call(capsys, own, "evaluate", "slm", "--json")
    assert code == 0 and "bare has no test split, so it is left out" in err
    assert {r["set"] for r in json.loads(out)["results"]} == {"notes"}


def test_a_gpt2_answers_no_further_than_its_positions(tmp_path, tokenizer, capsys):
    shape = Shape.of(ModelConfig(family="gpt2", num_layers=1, dims=32, num_heads=4), tokenizer.vocab_size, 32)
    path = export_model(tmp_path / "m", shape, initialise(shape, 0), tokenizer, {"tokenizer": "made"}, {})
    assert run(["generate", str(path), "--prompt", "x", "-m", "400", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] <= 31
    assert run(["generate", str(path), "--prompt", "word " * 60, "-m", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] <= 4 and "the context of m, 32 tokens: its last 15 were read" in err


def test_reports_and_checkpoints_may_change_within_a_run(own, config, report):
    other = config.training.model_copy(update={"report_every": 3, "checkpoint_every": 4})
    assert pretrain(Project(own, config.model_copy(update={"training": other}), report), Pretraining("slm")).finished


def test_nopt_trains_from_scratch_on_the_same_subset(own, config):
    made = specialize(Project(own, config), Specialisation("notes", source="none", tokens=4000))
    assert made.name == "notes-nopt-4k" and made.record["method"] == "nopt" and own.model("notes-nopt-4k").is_dir()
    assert made.record["inputs"]["data"] == find_run(own, "notes-slm-4k").record["inputs"]["data"]
    assert made.record["valid_nll"] > find_run(own, "notes-slm-4k").record["valid_nll"]


def test_pretrain_on_an_empty_workspace_prepares_first(tmp_path, texts, config, capsys):
    source = write_jsonl(tmp_path / "g.jsonl", texts[:600])
    raw = config.model_copy(update={"data": config.data.model_copy(update={"sets": {"generic": [str(source)]}})})
    (tmp_path / "c.yaml").write_text(dump_config(raw))
    workspace = Workspace(tmp_path / "w")
    code, out, err = call(
        capsys, workspace, "pretrain", "--config", str(tmp_path / "c.yaml"), "--set", "training.steps=4", "--json"
    )
    found = json.loads(out)
    assert code == 0 and found["run"] == "slm" and found["step"] == 4 and workspace.config_file.exists()
    assert "set 'generic' is not prepared yet: preparing it from" in err
    write_jsonl(source, texts[:601])
    code, _, err = call(capsys, workspace, "pretrain", "--set", "training.steps=4")
    assert code == 1 and "other inputs (changed: text)" in err
    source.unlink()
    code, out, _ = call(capsys, workspace, "pretrain", "--set", "training.steps=4")
    assert code == 0 and "is finished" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["specialize", "--domain", "note"], 1, "unknown set 'note' (did you mean notes?)"),
        (["specialize", "--domain", "notes", "--from", "slim"], 1, "no run 'slim' in"),
        (
            ["specialize", "--domain", "notes", "--tokens", "9M"],
            1,
            "tokens of notes were asked for and its train split holds",
        ),
        (["specialize", "--domain", "notes", "--tokens", "9X"], 2, "is not a size such as"),
        (["specialize", "--domain", "generic"], 1, "that is the generic set"),
        (["evaluate", "nothing"], 1, "no model 'nothing' in"),
        (["evaluate", "--domain", "notez"], 1, "set 'notez' is not prepared (did you mean notes?)"),
        (["generate", "notes-slm", "--prompt", "x"], 1, "(did you mean notes-slm-4k?)"),
        (["prepare", "x", "gone.txt"], 1, "gone.txt: no such file"),
        (["pretrain", "--method", "slim"], 2, "Invalid value for '--method'"),
        (["pretrain", "--tokens", "1M", "--hours", "3"], 2, "give --tokens or --hours, not both"),
        (["pretrain", "--set", "training.lr=3"], 1, "training.lr: unknown key"),
        (["info", "--config", "paperr"], 1, "did you mean paper?"),
        (["bogus"], 2, "No such command 'bogus'"),
    ],
)
def test_mistakes_get_one_sentence_and_an_exit_code(trained, capsys, arguments, code, message):
    if arguments == ["bogus"]:
        found, err = run(arguments), capsys.readouterr().err
    else:
        found, _, err = call(capsys, trained, *arguments)
    assert found == code and message in err and "Traceback" not in err


def test_a_domain_with_a_tiny_validation_set(own, texts, config, capsys, tmp_path):
    train, valid = write_jsonl(tmp_path / "t.jsonl", texts[:100]), write_jsonl(tmp_path / "v.jsonl", ["few words"])
    assert call(capsys, own, "prepare", "tiny", f"train={train}", f"valid={valid}")[0] == 0
    code, _, err = call(capsys, own, "specialize", "--domain", "tiny")
    assert code == 1 and "the validation set of tiny has" in err and "valid=PATH" in err


def test_a_workspace_of_another_tokenizer(own, tmp_path, texts, config, capsys):
    source = write_jsonl(tmp_path / "g.jsonl", texts[:500])
    settings = ("--set", "tokenizer.vocab_size=410", "--set", "data.context_length=32")
    assert call(capsys, own, "prepare", "generic", str(source), "--fresh", *settings)[0] == 0
    code, _, err = call(capsys, own, "specialize", "--domain", "notes", *settings)
    assert code == 1 and "was made by another tokenizer" in err
    code, out, _ = call(capsys, own, "evaluate", "slm", "--domain", "generic", *settings)
    assert code == 0 and "only bits per byte compare" in out, "the model reads the text with its own tokenizer"


def test_info_verifies_every_artifact(own, capsys):
    code, out, _ = call(capsys, own, "info", "--json", "--verify")
    found = json.loads(out)
    assert code == 0 and set(found) >= {"backend", "device", "memory_gb", "blas", "gflops", "versions"}
    assert found["gflops"] > 1 and len(found["verified"]) >= 10
    path = own.data("notes", "test") / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    code, _, err = call(capsys, own, "info", "--verify")
    assert code == 1 and "1 of" in err and "tokens.bin" in err


def test_info_shows_the_papers_models(capsys, tmp_path):
    code, out, _ = call(capsys, Workspace(tmp_path), "info", "--config", "paper")
    assert code == 0 and "121,992,192" in out and "759,365,376" in out and "126M" in out and "771M" in out
    assert not list(tmp_path.iterdir()), "looking leaves nothing behind"


def test_interrupting_the_command_exits_130_and_resumes(own, tmp_path):
    command = [sys.executable, "-m", "mlx_slm", "pretrain", "--workspace", str(own.root), "--name", "long", "--yes"]
    command += ["--set", "training.steps=100000", "--set", "training.report_every=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step      3/"):
                process.send_signal(signal.SIGINT)
                break
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command again goes on from there" in err and "Traceback" not in err
    last = max(int(name.removeprefix("step-")) for name in os.listdir(own.run("long") / "checkpoints"))
    again = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = next(line for line in again.stdout if "resuming" in line)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=120)
    assert again.returncode == 130 and f"resuming long at step {last:,} of 100,000" in first


def test_interrupting_the_preparation_exits_130_and_leaves_no_set(tmp_path):
    command = [sys.executable, "-m", "mlx_slm", "prepare", "generic", "docs:*", "--config", "quickstart"]
    command += ["--workspace", str(tmp_path / "w"), "--limit", "1M"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as work:
        assert any("training a tokenizer" in line for line in work.stdout)
        os.killpg(work.pid, signal.SIGINT)
        _, err = work.communicate(timeout=120)
    assert work.returncode == 130 and "the same command again goes on from there" in err and "Traceback" not in err
    assert not Workspace(tmp_path / "w").sets()


def test_a_full_disk_is_one_sentence(own, capsys, monkeypatch):
    from mlx_slm.training import checkpoint

    def full(*_, **__):
        raise OSError(28, "No space left on device", "somewhere/model.safetensors")

    monkeypatch.setattr(checkpoint, "save_arrays", full)
    code, _, err = call(capsys, own, "pretrain", "--name", "second")
    assert (
        code == 1
        and "no space left on the disk writing somewhere/model.safetensors" in err
        and "nothing is lost" in err
    )


def test_help_needs_no_heavy_import():
    heavy = ("mlx.core", "pydantic", "datasets", "transformers", "rich")
    script = (
        f"import sys; from mlx_slm.cli import run; run(['--help']); print([m for m in {heavy} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"

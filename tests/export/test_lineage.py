"""A model that comes from a published one: what identifies its run, and what its card says over generations."""

import json
import shutil

import mlx.core as mx
import pytest
from conftest import call, publish, write_jsonl
from huggingface_hub import ModelCard

from mlx_slm.config.files import dump_config
from mlx_slm.errors import SlmError
from mlx_slm.export.card import About, require_known_form
from mlx_slm.export.model import load_exported
from mlx_slm.machine.trees import flat
from mlx_slm.stages import specialize as stage
from mlx_slm.storage.artifacts import MANIFEST
from mlx_slm.storage.formats import identity_of, published_apart
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.store import Store
from mlx_slm.training.find import find_run

STEPS = (
    "--set", "data.context_length=32", "--set", "finetuning.max_steps=2", "--set", "finetuning.warmup_steps=1",
    "--set", "finetuning.eval_tokens=200",
)  # fmt: skip
OWN = "---\nlicense: other\nlicense_name: research-only\nlicense_link: https://example.org/terms\n---\nsomebody's\n"


@pytest.fixture
def model(tmp_path, texts):
    directory = publish(tmp_path / "published" / "tiny", texts[:300])
    (directory / "README.md").write_text(OWN)
    return directory


@pytest.fixture
def notes(tmp_path, texts):
    return write_jsonl(tmp_path / "notes.jsonl", texts[600:800])


def test_a_model_that_moved_or_changed_its_licence_is_the_same(model, notes, tmp_path, capsys):
    workspace, moved = Workspace(tmp_path / "w"), tmp_path / "moved"
    command = ("specialize", "--domain", "notes", *STEPS, "--lora", "4", "--name", "a", str(notes))
    code, _, err = call(capsys, workspace, *command, "--from", str(model))
    assert code == 0, err
    model.rename(moved)
    code, _, err = call(capsys, workspace, "export", "a", "--fuse")
    assert code == 1 and "is not there any more" in err and err.count("\n") == 1
    (moved / "README.md").write_text("---\nlicense: mit\n---\n")
    code, out, err = call(capsys, workspace, *command, "--from", str(moved))
    assert code == 0 and "is finished" in out, err
    assert find_run(workspace, "a").published["model"] == str(moved)
    code, _, err = call(capsys, workspace, "export", "a", "--fuse")
    assert code == 0, err
    assert ModelCard.load(workspace.model("a") / "README.md").data.license == "mit"
    assert str(tmp_path) not in (workspace.model("a") / MANIFEST).read_text(), "no path of this machine"


def test_a_licence_holds_for_every_generation(model, notes, tmp_path, texts, capsys):
    """From a published model, to a run of it, to a run of that run; and from pretraining that it began."""
    workspace, generic = Workspace(tmp_path / "w"), write_jsonl(tmp_path / "generic.jsonl", texts[:400])
    first = ("specialize", "--domain", "notes", *STEPS, "--name", "first", "--from", str(model), str(notes))
    assert call(capsys, workspace, *first)[0] == 0
    assert (
        call(capsys, workspace, "specialize", "--domain", "notes", *STEPS, "--name", "second", "--from", "first")[0]
        == 0
    )
    assert call(capsys, workspace, "prepare", "generic", str(generic))[0] == 0
    training = ("--tokens", "512", "--set", "training.batch_rows=4", "--set", "training.warmup_steps=1")
    code, _, err = call(capsys, workspace, "pretrain", "--init-from", str(model), *training, *STEPS)
    assert code == 0, err
    assert (
        call(capsys, workspace, "specialize", "--domain", "notes", *STEPS, "--name", "third", "--from", "slm")[0] == 0
    )
    for name in ("first", "second", "slm", "third"):
        card = ModelCard.load(workspace.model(name) / "README.md")
        said = card.data.license, card.data.license_name, card.data.license_link
        assert said == ("other", "research-only", "https://example.org/terms"), name
        assert "tiny" in card.text
    assert call(capsys, workspace, "export", "third", "--license", "mit")[0] == 0
    said = ModelCard.load(workspace.model("third") / "README.md").data
    assert said.license == "mit" and said.license_name is None, "a name belongs to the licence that it names"
    assert call(capsys, workspace, "export", "third")[0] == 0
    assert ModelCard.load(workspace.model("third") / "README.md").data.license == "mit"


@pytest.mark.parametrize(
    "about",
    [
        About(license="a b"), About(license="Apache 2"), About(license="mit\nx: y"), About(languages=("english",)),
        About(datasets=("a b",)), About(base_model="https://huggingface.co/a/b"),
    ],
)  # fmt: skip
def test_what_the_hub_would_not_take(about):
    with pytest.raises(SlmError, match="give "):
        require_known_form(about)


def test_what_the_hub_takes():
    require_known_form(About("openrail++"))
    taken = About("cc-by-sa-4.0", languages=("en", "pt-BR", "zho"), datasets=("a/b.c", "squad"), base_model="A/b-1.0")
    require_known_form(taken)


def test_a_start_that_stops_early_leaves_its_settings(model, notes, tmp_path, texts, capsys, monkeypatch):
    """Sets that are prepared before it goes on are as its model reads them."""
    workspace = Workspace(tmp_path / "w")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "domain_set", stopped)
        assert call(capsys, workspace, "specialize", "--domain", "notes", "--from", str(model), str(notes))[0] == 130
    third = write_jsonl(tmp_path / "third.jsonl", texts[300:450])
    code, _, err = call(capsys, workspace, "prepare", "third", str(third))
    assert code == 0, err
    assert Store(workspace.data("third", "train")).context_length == 64, "the model's"


def test_records_of_before_are_read(model):
    facts = {"model": str(model), "revision": None, "license": "mit"}
    record = {"inputs": {"from": {**facts, "weights": "abc"}, "method": "slm"}, "started": 5.0}
    read, identity = published_apart(record), identity_of(record)
    assert read["inputs"]["from"] == {"weights": "abc"} and read["published"] == facts
    assert identity_of(read) == identity == identity_of(published_apart(read)), "runs that rest on it find it"
    assert identity_of(read | {"started": 6.0, "identity": None}) != identity
    ours = {"inputs": {"from": {"run": "slm", "step": 3}}, "started": 5.0}
    assert published_apart(ours) is ours and json.dumps(ours)


def test_replay_needs_the_generic_set(model, notes, tmp_path, capsys):
    workspace = Workspace(tmp_path / "w")
    command = ("specialize", "--domain", "notes", "--from", str(model), str(notes), "--replay", "0.2")
    code, _, err = call(capsys, workspace, *command)
    assert code == 1 and "mlx-slm prepare generic SOURCE" in err and err.count("\n") == 1
    assert not (workspace.root / "tokenizer").exists()
    shutil.rmtree(workspace.root, ignore_errors=True)
    code, _, err = call(capsys, workspace, *command[:-1], "1")
    assert code == 2 and "--replay" in err and "0<=x<1" in err


def test_what_is_known_of_an_origin_is_what_was_known_at_training(model, notes, tmp_path, texts, capsys):
    """A run of that name made again from another model, or removed, changes nothing of what came of it before."""
    workspace = Workspace(tmp_path / "w")
    other = publish(tmp_path / "other", texts[:300])
    (other / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    command = ("specialize", "--domain", "notes", *STEPS)
    assert call(capsys, workspace, *command, "--from", str(model), "--name", "a", str(notes))[0] == 0
    assert call(capsys, workspace, *command, "--from", "a", "--name", "c")[0] == 0
    assert call(capsys, workspace, *command, "--from", str(other), "--name", "a", "--fresh")[0] == 0
    for _ in range(2):
        shutil.rmtree(workspace.model("c"))
        assert call(capsys, workspace, "export", "c")[0] == 0
        card = ModelCard.load(workspace.model("c") / "README.md")
        assert card.data.license_name == "research-only" and "tiny" in card.text
        assert json.loads((workspace.model("c") / "config.json").read_text())["max_position_embeddings"] == 64
        shutil.rmtree(workspace.run("a"), ignore_errors=True)


def test_a_run_does_not_remove_what_it_starts_from(model, notes, tmp_path, capsys):
    workspace, command = Workspace(tmp_path / "w"), ("specialize", "--domain", "notes", *STEPS)
    assert call(capsys, workspace, *command, "--from", str(model), "--name", "a", str(notes))[0] == 0
    assert call(capsys, workspace, *command, "--from", "a", "--name", "c", "--lora", "2", "--fuse")[0] == 0
    for source in ("a", "c"):
        code, _, err = call(capsys, workspace, *command, "--from", source, "--name", "a", "--fresh")
        assert code == 1 and "--fresh would remove it: give another --name" in err and err.count("\n") == 1
        assert call(capsys, workspace, "info", "--verify")[0] == 0, "all is there"


def test_an_edited_licence_reaches_the_card(model, notes, tmp_path, capsys):
    workspace = Workspace(tmp_path / "w")
    command = ("specialize", "--domain", "notes", *STEPS, "--from", str(model), "--name", "a", str(notes))
    assert call(capsys, workspace, *command)[0] == 0
    assert call(capsys, workspace, "export", "a", "--language", "en")[0] == 0
    (model / "README.md").write_text("---\nlicense: [mit, apache-2.0]\nbase_model: ../local dir\n---\n")
    assert call(capsys, workspace, *command)[0] == 0
    said = ModelCard.load(workspace.model("a") / "README.md").data
    assert (said.license, said.license_name, said.license_link) == ("other", "mit, apache-2.0", None)
    assert said.language == ["en"] and said.base_model is None
    assert call(capsys, workspace, "export", "a", "--license", "bsd-3-clause")[0] == 0
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    assert call(capsys, workspace, *command)[0] == 0
    assert ModelCard.load(workspace.model("a") / "README.md").data.license == "bsd-3-clause", "said by hand, it stays"


@pytest.mark.parametrize(
    "options", [("--lora", "4", "--teacher", "x"), ("--select", "pretrained"), ("--domain", "nots"), ("--tokens", "1B")]
)
def test_a_start_that_fails_binds_nothing(options, model, notes, tmp_path, texts, capsys):
    workspace, other = Workspace(tmp_path / "w"), publish(tmp_path / "other", texts[300:600])
    sources = () if options[0] == "--domain" else (str(notes),)
    command = ("specialize", "--domain", "notes", "--from", str(model), *STEPS, *options, *sources)
    code, _, err = call(capsys, workspace, *command)
    assert code == 1 and err.count("error") == 1, err
    if options[0] == "--tokens":
        return  # the set is prepared, and stays
    assert not workspace.tokenizer.exists() and not workspace.config_file.exists()
    code, _, err = call(capsys, workspace, "specialize", "--domain", "notes", "--from", str(other), *STEPS, str(notes))
    assert code == 0, err


def test_a_very_long_context_leaves_the_model_readable(model, notes, tmp_path, capsys):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10_000_000}))
    workspace, command = Workspace(tmp_path / "w"), ("specialize", "--domain", "notes", *STEPS)
    assert call(capsys, workspace, *command, "--from", str(model), "--name", "a", str(notes))[0] == 0
    code, _, err = call(capsys, workspace, "export", "a", "--dtype", "bfloat16")
    assert code == 0, err


def test_a_bundle_hands_the_licence_over(model, tmp_path, texts, notes, capsys):
    workspace, elsewhere = Workspace(tmp_path / "w"), Workspace(tmp_path / "elsewhere")
    generic = write_jsonl(tmp_path / "generic.jsonl", texts[:400])
    settings = ("--set", f"tokenizer.path={model}", "--set", "data.context_length=32", "--set", "clusters.encoder=lsi")
    assert call(capsys, workspace, "prepare", "generic", str(generic), *settings)[0] == 0
    training = ("--tokens", "512", "--set", "training.batch_rows=4", "--set", "training.warmup_steps=1")
    command = ("pretrain", "--method", "pn", "--k", "2", "--init-from", str(model), *training)
    code, _, err = call(capsys, workspace, *command)
    assert code == 0, err
    assert call(capsys, workspace, "export", "pn", "--bundle", str(tmp_path / "bundle"))[0] == 0
    assert ModelCard.load(tmp_path / "bundle" / "README.md").data.license_name == "research-only"
    taken = ("specialize", "--domain", "notes", "--from", str(tmp_path / "bundle"), "--name", "a", str(notes), *STEPS)
    code, _, err = call(capsys, elsewhere, *taken)
    assert code == 0, err
    card = ModelCard.load(elsewhere.model("a") / "README.md")
    assert card.data.license_name == "research-only" and "tiny" in card.text
    assert str(tmp_path) not in (tmp_path / "bundle" / "run.json").read_text()


def test_a_milestone_is_a_model_wherever_one_is_taken(prepared, config, tmp_path, capsys):
    """generate, export, pretrain --init-from, evaluate, of a pretraining that keeps its sixth step."""
    shutil.copytree(prepared.root, tmp_path / "w")
    workspace = Workspace(tmp_path / "w")
    workspace.config_file.write_text(dump_config(config))
    kept = 6 * config.training.batch_rows * 32
    assert call(capsys, workspace, "pretrain", "--set", f"training.milestones=[{kept}]")[0] == 0
    name, path = f"slm@{kept}", workspace.model("slm-step-6")
    code, _, err = call(capsys, workspace, "generate", name, "-p", "Return", "-m", "2", "--json")
    assert code == 0 and path.exists(), err
    half, whole = (flat(load_exported(each)[0].parameters()) for each in (path, workspace.model("slm")))
    assert all(mx.array_equal(half[n], v) for n, v in flat(find_run(workspace, name).weights()).items())
    assert not all(mx.array_equal(half[n], v) for n, v in whole.items())
    code, _, err = call(capsys, workspace, "export", name, "--format", "gguf", "--type", "f16")
    assert code == 0, err
    code, _, err = call(capsys, workspace, "evaluate", name, "slm", "--domain", "notes", "--json")
    assert code == 0, err
    code, _, err = call(capsys, workspace, "pretrain", "--init-from", name, "--name", "more")
    assert code == 0 and find_run(workspace, "more").published["model"] == str(path), err
    shutil.rmtree(workspace.model("slm"))
    assert call(capsys, workspace, "generate", "slm", "-p", "Return", "-m", "2", "--json")[0] == 0, "written again"
    code, _, err = call(capsys, workspace, "generate", "slm@999", "-p", "x")
    assert code == 1 and "keeps no checkpoint after 999 tokens" in err and err.count("\n") == 1

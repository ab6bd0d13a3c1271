"""A model that comes from a published one: what identifies its run, and what its card says over generations."""

import json
import shutil

import pytest
from conftest import call, publish, write_jsonl
from huggingface_hub import ModelCard

from mlx_slm.errors import SlmError
from mlx_slm.export.card import About, require_known_form
from mlx_slm.stages import specialize as stage
from mlx_slm.storage.artifacts import MANIFEST
from mlx_slm.storage.formats import published_apart
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.store import Store
from mlx_slm.training.runs import find_run

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
    record = {"inputs": {"from": {**facts, "weights": "abc"}, "method": "slm"}}
    assert published_apart(record) == {"inputs": {"from": {"weights": "abc"}, "method": "slm"}, "published": facts}
    ours = {"inputs": {"from": {"run": "slm", "step": 3}}}
    assert published_apart(ours) is ours and json.dumps(ours)


def test_replay_needs_the_generic_set(model, notes, tmp_path, capsys):
    workspace = Workspace(tmp_path / "w")
    command = ("specialize", "--domain", "notes", "--from", str(model), str(notes), "--set", "finetuning.replay=0.2")
    code, _, err = call(capsys, workspace, *command)
    assert code == 1 and "mlx-slm prepare generic SOURCE" in err and err.count("\n") == 1
    assert not (workspace.root / "tokenizer").exists()
    shutil.rmtree(workspace.root, ignore_errors=True)
    code, _, err = call(capsys, workspace, *command[:-1], "finetuning.replay=1")
    assert code != 0 and "finetuning.replay" in err

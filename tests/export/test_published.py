"""`specialize --from` a published model, and `evaluate` of any: with its own tokenizer, without a generic set."""

import json
import math
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import call, publish, write_jsonl
from huggingface_hub import ModelCard

from mlx_slm.errors import SlmError
from mlx_slm.export import published as hub
from mlx_slm.export.model import load_exported, weights_of
from mlx_slm.export.start import Pretrained
from mlx_slm.models.families import FAMILIES
from mlx_slm.models.transformer import Transformer
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.hub_tokenizer import open_tokenizer, tokenizer_of
from mlx_slm.text.reread import Reread, documents_of
from mlx_slm.text.store import Store
from mlx_slm.training.find import find_run

SETTINGS = (
    "--set", "data.context_length=32", "--set", "data.valid_fraction=0.2", "--set", "data.test_fraction=0.2",
    "--set", "finetuning.max_steps=6", "--set", "finetuning.warmup_steps=1", "--set", "finetuning.eval_tokens=500",
    "--set", "finetuning.published_rate=1e-3",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory, texts):
    return publish(tmp_path_factory.mktemp("published") / "tiny-20M", texts[:300])


@pytest.fixture(scope="module")
def notes(tmp_path_factory, texts):
    return write_jsonl(tmp_path_factory.mktemp("notes") / "notes.jsonl", texts[600:800])


def test_a_published_model_is_specialised_in_an_empty_workspace(model, notes, tmp_path, capsys):
    workspace = Workspace(tmp_path / "w")
    command = ("specialize", "--domain", "notes", "--from", str(model), str(notes), *SETTINGS)
    code, out, err = call(capsys, workspace, *command, "--json")
    assert code == 0, err
    done = json.loads(out)
    assert done["run"] == "notes-tiny-20M-all" and workspace.sets() == ["notes"], "no generic set is needed"
    run, origin = find_run(workspace, done["run"]), Pretrained(model, 32)
    assert run.record["inputs"]["from"] == {"weights": origin.fingerprint}
    assert run.published == {"model": str(model), "revision": None, "license": "apache-2.0", "base_model": None,
                             "context_length": 64}  # fmt: skip
    assert run.record["inputs"]["recipe"]["learning_rate"] == 1e-3
    code, out, err = call(capsys, workspace, "evaluate", str(model), done["run"], "--domain", "notes", "--json")
    assert code == 0, err
    before, after = json.loads(out)["results"]
    assert after["bits_per_byte"] < before["bits_per_byte"] - 0.01 and "tokenizer" not in before, "one tokenizer"
    card = ModelCard.load(workspace.model(done["run"]) / "README.md")
    assert card.data.license == "apache-2.0" and "tiny-20M" in card.text
    settings = json.loads((workspace.model(done["run"]) / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages[0]['content'] }}"
    code, out, _ = call(capsys, workspace, *command)
    assert code == 0 and "is finished" in out


def test_adapters_fit_the_original(model, notes, tmp_path, capsys):
    from mlx_lm import load

    workspace = Workspace(tmp_path / "w")
    command = ("specialize", "--domain", "notes", "--from", str(model), str(notes), *SETTINGS, "--lora", "4")
    code, out, err = call(capsys, workspace, *command)
    assert code == 0, err
    name = "notes-tiny-20M-lora-all"
    assert f"mlx_lm.generate --model {model} --adapter-path" in out and not workspace.model(name).exists()
    theirs, _ = load(str(model), adapter_path=str(workspace.adapter(name)))
    run = find_run(workspace, name)
    ours = Transformer(run.shape)
    ours.update(weights_of(workspace, run))
    tokens = mx.array(np.random.default_rng(0).integers(0, 400, (2, 32)))
    difference = mx.abs(theirs(tokens) - ours.logits(tokens)).max().item()
    assert difference < 1e-5 < mx.abs(load(str(model))[0](tokens) - ours.logits(tokens)).max().item()
    other = copy = tmp_path / "moved"
    shutil.copytree(model, copy)
    code, _, err = call(capsys, workspace, "export", name, "--fuse")
    assert code == 0 and workspace.model(name).exists(), err
    weights = mx.load(str(model / "model.safetensors"))
    changed = {n: v + 1 if n == "model.norm.weight" else v for n, v in weights.items()}
    try:
        mx.save_safetensors(str(model / "model.safetensors"), changed)
        shutil.rmtree(workspace.model(name))
        code, _, err = call(capsys, workspace, "export", name, "--fuse")
        assert code == 1 and "has other weights since" in err and err.count("\n") == 1
    finally:
        shutil.copyfile(other / "model.safetensors", model / "model.safetensors")


def test_any_model_is_evaluated_on_the_same_text(model, prepared, tmp_path, capsys):
    """By hand: each document behind an end of text, in windows of the set's context, over the bytes of the text."""
    workspace = Workspace(tmp_path / "w")
    shutil.copytree(prepared.root, workspace.root)
    code, out, err = call(capsys, workspace, "evaluate", str(model), "--domain", "notes", "--json")
    assert code == 0, err
    (row,) = json.loads(out)["results"]
    store, ours, own = Store(workspace.data("notes", "test")), open_tokenizer(workspace.tokenizer), tokenizer_of(model)
    texts = ours.decode_all(documents_of(store))
    reader = Transformer(Pretrained(model, None).shape)
    reader.update(Pretrained(model, None).parameters())
    total = count = 0
    for ids in own.encode(texts):
        ids = [*ids, own.eos_id]
        for start in range(0, len(ids), store.context_length):
            window = ids[start : start + store.context_length]
            logits = reader.logits(mx.array([[own.eos_id, *window[:-1]]]))[0]
            chances = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            total -= sum(chances[i, token].item() for i, token in enumerate(window))
            count += len(window)
    size = sum(len(text.encode()) for text in texts)
    assert row["tokenizer"] == "own" and row["tokens"] == count and size == store.num_bytes
    assert row["bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-5)
    code, out, _ = call(capsys, workspace, "evaluate", str(model), "--domain", "notes")
    assert "only bits per byte compare" in out


def test_text_read_again_by_the_same_tokenizer_is_the_same(prepared):
    store, tokenizer = Store(prepared.data("notes", "valid")), open_tokenizer(prepared.tokenizer)
    again = Reread(store, tokenizer, tokenizer, store.context_length)
    assert np.array_equal(again.tokens, store.tokens[:])
    for field in ("offset", "length", "document"):
        assert np.array_equal(again.windows[field], store.windows[:][field])
    assert again.num_bytes == store.num_bytes


def damaged(directory, **config):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize(
    ("break_it", "wanted"),
    [
        (lambda d: damaged(d, model_type="mamba"), "supported: gpt2, llama, qwen2, qwen3"),
        (lambda d: damaged(d, auto_map={"AutoModel": "x.py"}), "brings code of its own"),
        (lambda d: damaged(d, hidden_size=10**9), "config.json is not of a form"),
        (lambda d: damaged(d, rope_scaling={"rope_type": "yarn", "factor": 2}), "not supported: rope_scaling"),
        (lambda d: damaged(d, quantization={"bits": 4, "group_size": 64}), "dequantise them first"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pickles, which are never opened"),
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda d: (d / "tokenizer_config.json").write_text("{}") and damaged(d, eos_token_id=None), "no end-of-text"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors"),
        (lambda d: damaged(d, quantization=5), "quantization is 5"),
        (lambda d: damaged(d, max_position_embeddings=None), "how long a text it reads"),
        (lambda d: (d / "chat_template.jinja").write_bytes(b"\xff\xfe"), "chat_template.jinja: not UTF-8"),
    ],
)
def test_a_model_that_cannot_be_started_from(break_it, wanted, model, notes, tmp_path, capsys):
    copy, workspace = tmp_path / "copy", Workspace(tmp_path / "w")
    shutil.copytree(model, copy)
    break_it(copy)
    code, _, err = call(
        capsys, workspace, "specialize", "--domain", "notes", "--from", str(copy), str(notes), *SETTINGS
    )
    assert code == 1 and wanted in err and err.count("\n") == 1 and "Traceback" not in err, err
    assert not workspace.runs() and not (workspace.root / "tokenizer").exists(), "nothing half-made"


def test_what_does_not_fit_the_workspace(model, notes, prepared, tmp_path, capsys):
    workspace = Workspace(tmp_path / "w")
    shutil.copytree(prepared.root, workspace.root)
    code, _, err = call(capsys, workspace, "specialize", "--domain", "notes", "--from", str(model))
    assert code == 1 and "use a new --workspace" in err and err.count("\n") == 1
    empty = Workspace(tmp_path / "e")
    command = ("specialize", "--domain", "notes", "--from", str(model), str(notes), *SETTINGS)
    code, out, err = call(capsys, empty, *command, "--set", "data.context_length=128")
    assert code == 0 and "data.context_length=64" in out, err
    assert Store(empty.data("notes", "train")).context_length == 64
    code, _, err = call(capsys, empty, *command, "--lora", "64", "--set", "data.context_length=64")
    assert code == 1 and "have rank 32 at the most" in err


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        ("GatedRepoError", "hf auth login"),
        ("RepositoryNotFoundError", "no such model on the Hub"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("ConnectionError", "the Hub was not reached"),
    ],
)
def test_what_the_hub_may_answer(error, wanted, monkeypatch):
    import huggingface_hub

    kind = getattr(huggingface_hub.errors, error, ConnectionError)

    def answer(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    with pytest.raises(SlmError, match=wanted):
        hub.download("me/tiny@v9")
    assert hub.is_hub_name("me/tiny@v9") and not hub.is_hub_name("tiny") and not hub.is_hub_name("/etc/hosts")


def test_a_name_of_the_hub_with_its_revision(model, notes, tmp_path):
    """The real library, on a cache as it fills one; no network."""
    sha = "1234567890" * 4
    repository = tmp_path / "hf" / "hub" / "models--me--tiny"
    shutil.copytree(model, repository / "snapshots" / sha)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(sha)

    def run(*arguments):
        environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "mlx_slm", *arguments, "--workspace", str(tmp_path / "w")]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)

    done = run("specialize", "--domain", "notes", "--from", f"me/tiny@{sha}", str(notes), *SETTINGS, "--json")
    assert done.returncode == 0, done.stderr
    workspace = Workspace(tmp_path / "w")
    origin = find_run(workspace, json.loads(done.stdout)["run"]).published
    assert origin["model"] == origin["base_model"] == "me/tiny" and origin["revision"] == sha
    data = ModelCard.load(workspace.model("notes-tiny-all") / "README.md").data
    assert data.base_model == "me/tiny" and data.license == "apache-2.0"
    done = run("generate", "me/tiny", "-p", "Return", "-m", "2", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["tokens"] >= 1, done.stderr
    done = run("evaluate", "me/tiny", "--domain", "notes", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["results"][0]["model"] == "me/tiny", done.stderr
    done = run("generate", "me/absent", "-p", "Return")
    assert done.returncode == 1 and "no such directory here" in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )


def test_every_family_is_started_from(texts, notes, tmp_path, capsys):
    for family in FAMILIES:
        workspace = Workspace(tmp_path / f"w-{family}")
        directory = publish(tmp_path / family, texts[:300], family)
        code, out, err = call(
            capsys,
            workspace,
            "specialize",
            "--domain",
            "notes",
            "--from",
            str(directory),
            str(notes),
            *SETTINGS,
            "--json",
        )
        assert code == 0, err
        exported, _ = load_exported(workspace.model(json.loads(out)["run"]))
        assert exported.shape.family == family


def test_sixty_notes_are_enough(model, texts, tmp_path, capsys):
    """With the defaults, a fiftieth of which would hold nothing out."""
    (tmp_path / "notes").mkdir()
    for number, text in enumerate(texts[600:660]):
        (tmp_path / "notes" / f"{number}.md").write_text(text)
    workspace = Workspace(tmp_path / "w")
    steps = ("--set", "finetuning.max_steps=2", "--set", "finetuning.warmup_steps=1")
    command = ("specialize", "--domain", "notes", "--from", str(model), f"{tmp_path}/notes/*.md", *steps)
    code, _, err = call(capsys, workspace, *command)
    assert code == 0, err
    counts = [Store(workspace.data("notes", split)).num_documents for split in ("train", "valid", "test")]
    assert sum(counts) >= 58 and min(counts) >= 2 and counts[0] > 40
    code, out, err = call(capsys, workspace, *command)
    assert code == 0 and "is finished" in out, err


def test_a_workspace_keeps_what_its_model_brought(model, notes, texts, tmp_path, capsys):
    """Context, shares and tokenizer hold for the sets and models that follow, and a failed start binds nothing."""
    workspace, steps = (
        Workspace(tmp_path / "w"),
        ("--set", "finetuning.max_steps=2", "--set", "finetuning.warmup_steps=1"),
    )
    code, _, err = call(
        capsys, workspace, "specialize", "--domain", "notes", "--from", str(model), str(tmp_path / "no")
    )
    assert code == 1 and not (workspace.root / "tokenizer").exists(), err
    code, _, err = call(capsys, workspace, "specialize", "--domain", "notes", "--from", str(model), str(notes), *steps)
    assert code == 0 and workspace.config_file.exists(), err
    two = write_jsonl(tmp_path / "two.jsonl", texts[300:450])
    command = ("specialize", "--domain", "two", "--from", "notes-tiny-20M-all", str(two), *steps)
    code, _, err = call(capsys, workspace, *command)
    assert code == 0, err
    assert Store(workspace.data("two", "train")).context_length == 64
    code, out, err = call(capsys, workspace, "evaluate", "--json")
    assert code == 0 and len(json.loads(out)["results"]) == 4, err
    odd = tmp_path / "ck" / "snapshots" / "step1"
    shutil.copytree(model, odd)
    (odd / "README.md").write_text("---\nlicense: 2024-01-01\ndatasets: 5\n---\n")
    code, _, err = call(
        capsys, workspace, "specialize", "--domain", "two", "--from", str(odd), *steps, "--lora", "4", "--fuse"
    )
    assert code == 0, err
    assert "base_model" not in ModelCard.load(workspace.model("two-step1-lora-all") / "README.md").data.to_dict()


def test_our_own_models_are_evaluated_anywhere(model, prepared, notes, tmp_path, capsys):
    own, other = Workspace(tmp_path / "own"), Workspace(tmp_path / "other")
    assert call(capsys, own, "specialize", "--domain", "notes", "--from", str(model), str(notes), *SETTINGS)[0] == 0
    shutil.copytree(prepared.root, other.root)
    path = own.model("notes-tiny-20M-all")
    code, out, err = call(capsys, other, "evaluate", str(path), "--domain", "notes", "--json")
    assert code == 0 and json.loads(out)["results"][0]["tokenizer"] == "own", err

"""A network to hand over: private text is specialised where it is."""

import json
import math
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import call, copy_of

from mlx_slm.config.files import load_config
from mlx_slm.embedding.encoder import window_texts
from mlx_slm.experts.bundle import find_source, install_bundle
from mlx_slm.export.model import load_exported
from mlx_slm.report import Report
from mlx_slm.storage.records import fingerprint
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.hub_tokenizer import open_tokenizer
from mlx_slm.text.store import Store


@pytest.fixture
def own(with_experts, tmp_path) -> Workspace:
    """A copy to write into."""
    return copy_of(with_experts, tmp_path / "w")


@pytest.mark.parametrize("name", ["pn", "mix"])
def test_a_bundle_specialises_private_text_on_a_machine_with_nothing_else(name, with_experts, tmp_path, capsys):
    bundle, notes = tmp_path / "bundle", tmp_path / "notes"
    code, out, err = call(capsys, with_experts, "export", name, "--bundle", str(bundle), "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["k"] == 4 and facts["encoder"]["encoder"] == "lsi"
    assert "generic" in json.loads((bundle / "run.json").read_text())["inputs"]
    assert load_config(bundle / "config.yaml").data.sets == {}
    assert not list(bundle.rglob("optimizer.safetensors")), "moments are of no use to who gets it"
    notes.mkdir()
    store, tokenizer_ = Store(with_experts.data("notes", "train")), with_experts.tokenizer
    for i, text in enumerate(window_texts(store, open_tokenizer(tokenizer_), np.arange(300))):
        (notes / f"{i}.md").write_text(text)
    empty = Workspace(tmp_path / "elsewhere")
    files = [str(path) for path in sorted(notes.glob("*.md"))]
    arguments = ("specialize", "--domain", "private", "--from", str(bundle), "--select", "pretrained", *files, "--json")
    code, out, err = call(capsys, empty, *arguments)
    assert code == 0, err
    result = json.loads(out)
    at_home = Workspace(tmp_path / "home")
    shutil.copytree(with_experts.root, at_home.root)
    code, out, err = call(capsys, at_home, *arguments[:4], name, *arguments[5:])
    assert code == 0, err
    other = json.loads(out)
    assert result["valid_nll"] == other["valid_nll"], "the same as at home"
    for key in ("expert", "scores", "share"):
        assert result["selection"][key] == other["selection"][key]
    shutil.rmtree(bundle)
    model, _ = load_exported(empty.model(f"private-{name}-pretrained-all"))
    assert math.isfinite(model.logits(mx.array([[1, 2, 3]])).sum().item())
    code, _, err = call(capsys, empty, *arguments[:4], str(bundle), "--name", "x")
    assert code == 1 and "no bundle is there" in err


def test_a_bundle_meets_a_workspace_with_another_tokenizer(own, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    assert call(capsys, own, "export", "pn", "--bundle", str(bundle))[0] == 0
    code, _, err = call(capsys, own, "export", "slm", "--bundle", str(tmp_path / "other"))
    assert code == 1 and "run slm has no experts to hand over" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    code, _, err = call(capsys, own, "export", "pn", "--bundle", str(tmp_path / "full"))
    assert code == 1 and "there is something else" in err and (tmp_path / "full" / "mine.txt").exists()
    other = Workspace(tmp_path / "w2")
    shutil.copytree(own.tokenizer, other.tokenizer)
    manifest = json.loads((other.tokenizer / "manifest.json").read_text())
    manifest["fingerprint"] = "another"
    manifest["checksum"] = fingerprint({k: v for k, v in manifest.items() if k != "checksum"})
    (other.tokenizer / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = call(capsys, other, "specialize", "--domain", "notes", "--from", str(bundle))
    assert code == 1 and "is another than that of the bundle" in err and "use a new --workspace" in err


def test_a_damaged_bundle_is_not_taken(own, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    assert call(capsys, own, "export", "pn", "--bundle", str(bundle))[0] == 0
    weights = next(bundle.rglob("model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, _, err = call(
        capsys, Workspace(tmp_path / "new"), "specialize", "--domain", "notes", "--from", str(bundle), "x.md"
    )
    assert code == 1 and "is damaged" in err and not (tmp_path / "new" / "tokenizer").exists()


def test_a_bundle_is_read_only_and_a_run_of_its_name_comes_first(own, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(capsys, own, "export", "pn", "--bundle", "pn")[0] == 0
    assert find_source(own, "pn").path == own.run("pn"), "a bare name is a run where there is one"
    assert find_source(own, "./pn").path == tmp_path / "pn"
    for folder in ("pn", "pn/encoder", "pn/clusters", "pn/checkpoints"):
        (tmp_path / folder / ".DS_Store").write_bytes(b"what the Finder leaves")
    install_bundle(Workspace(tmp_path / "w3"), tmp_path / "pn", Report())
    assert call(capsys, own, "export", "pn", "--bundle", "pn")[0] == 0
    weights = next((tmp_path / "pn").rglob("model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    before = (tmp_path / "pn" / "run.json").read_bytes()
    code, _, err = call(capsys, own, "specialize", "--domain", "notes", "--from", "./pn")
    assert code == 1 and "get the bundle again" in err
    assert (tmp_path / "pn" / "run.json").read_bytes() == before
    (tmp_path / "pn" / "mine.md").write_text("keep me")
    code, _, err = call(capsys, own, "export", "pn", "--bundle", "pn")
    assert code == 1 and "there is something else (mine.md)" in err and (tmp_path / "pn" / "mine.md").exists()

"""Numbers of formats: what another version wrote is named with the command that builds it again, and that works."""

import json
import re
import shlex
import shutil

import pytest
from conftest import call, copy_of

from mlx_slm.storage import formats
from mlx_slm.storage.artifacts import MANIFEST, load_manifest, new_artifact
from mlx_slm.storage.records import fingerprint
from mlx_slm.training.find import find_run


@pytest.fixture
def own(with_experts, tmp_path):
    return copy_of(with_experts, tmp_path / "w")


def without_numbers(workspace) -> int:
    """Turn a workspace into one of before there were numbers; returns how many artifacts it has."""
    count = 0
    for file in workspace.root.rglob(MANIFEST):
        manifest = json.loads(file.read_text())
        del manifest["inputs"][formats.KEY], manifest["checksum"]
        file.write_text(json.dumps(manifest | {"checksum": fingerprint(manifest)}))
        count += 1
    for file in workspace.root.rglob("run.json"):
        record = json.loads(file.read_text())
        del record["inputs"]["rows"], record["checksum"]
        file.write_text(json.dumps(record | {"checksum": fingerprint(record)}))
    return count


def test_every_artifact_has_the_number_of_its_kind(own):
    kinds = {}
    for file in own.root.rglob(MANIFEST):
        manifest = json.loads(file.read_text())
        kinds[manifest["kind"]] = manifest["inputs"][formats.KEY]
        assert formats.KEY not in load_manifest(file.parent, manifest["kind"])["inputs"], "what is compared has none"
    assert set(kinds) >= {"tokenizer", "token store", "encoder", "embeddings", "clusters", "assignments", "model"}
    assert set(kinds) <= set(formats.FORMATS) and set(kinds.values()) == {1}
    assert find_run(own, "slm").record["inputs"]["rows"] == formats.ROWS


def test_a_workspace_of_before_there_were_numbers_goes_on(own, capsys):
    assert without_numbers(own) > 20
    for command in (["pretrain"], ["pretrain", "--method", "pn"], ["cluster", "--k", "4"]):
        code, out, err = call(capsys, own, *command)
        assert code == 0 and ("is finished" in out or command[0] == "cluster"), err
    code, out, err = call(capsys, own, "specialize", "--domain", "notes", "--from", "pn", "--tokens", "2k")
    assert code == 0, err


def with_former_keys(workspace) -> None:
    """Turn the records of a workspace into those of before keys of them were renamed."""
    for file in workspace.root.rglob("run.json"):
        record = json.loads(file.read_text())
        del record["checksum"]
        for section, former, now in (
            ("training", "checkpoint_layers", "recompute_layers"),
            ("from", "is", "identity"),
            ("teacher", "is", "identity"),
        ):
            if section in record["inputs"]:
                record["inputs"][section][former] = record["inputs"][section].pop(now)
        file.write_text(json.dumps(record | {"checksum": fingerprint(record)}))


def test_runs_of_before_keys_were_renamed_are_the_same_runs(own, capsys):
    adapted = ("specialize", "--domain", "notes", "--from", "slm", "--tokens", "2k", "--lora", "2", "--name", "adapted")
    taught = ("specialize", "--domain", "notes", "--teacher", "slm", "--from", "slm", "--tokens", "2k", "--name", "d")
    for command in (adapted, taught):
        code, _, err = call(capsys, own, *command)
        assert code == 0, err
    identities = {name: find_run(own, name).identity for name in own.runs()}
    with_former_keys(own)
    for name, identity in identities.items():
        record = json.loads((own.run(name) / "run.json").read_text())
        assert "recompute_layers" not in record["inputs"].get("training", {}) and "identity" not in str(record)
        assert find_run(own, name).identity == identity == fingerprint([record["inputs"], record["started"]])
    for command in (adapted, taught, ("pretrain",), ("pretrain", "--method", "pn"), ("pretrain", "--method", "mix")):
        code, out, err = call(capsys, own, *command)
        assert code == 0 and "is finished" in out, err
    shutil.rmtree(own.adapter("adapted"))
    code, _, err = call(capsys, own, *adapted, "--fuse")
    assert code == 0 and own.model("adapted").exists(), err


def test_a_run_of_before_keys_were_renamed_goes_on(own, capsys):
    identity = find_run(own, "slm").identity
    with_former_keys(own)
    run = find_run(own, "slm")
    run.record["status"] = "running"
    run.save()
    assert json.loads((run.path / "run.json").read_text())["inputs"]["training"]["recompute_layers"] is None
    code, _, err = call(capsys, own, "pretrain", "--set", "training.checkpoint_layers=true")
    assert code == 1 and "training.recompute_layers None -> True" in err
    code, _, err = call(capsys, own, "pretrain")
    assert code == 0 and find_run(own, "slm").finished and find_run(own, "slm").identity == identity, err


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("token store", ("pretrain", "--name", "another")),
        ("clusters", ("pretrain", "--method", "is", "--domain", "notes", "--k", "4")),
        ("tokenizer", ("pretrain", "--name", "another")),
        ("model", ("evaluate", "slm")),
    ],
)
def test_another_number_is_told_with_the_command_that_builds_it_again(kind, command, own, capsys, monkeypatch):
    monkeypatch.setitem(formats.FORMATS, kind, 2)
    code, _, err = call(capsys, own, *command)
    assert code == 1 and f"has format 1 of a {kind}, this version reads 2" in err and "Traceback" not in err
    advised = re.search(r"`mlx-slm ([^`]*)`", err)
    if advised:  # the texts of the workspace are gone: the command is the right one if it gets as far as to them
        code, _, err = call(capsys, own, *shlex.split(advised[1]))
        assert code == 0 or "generic.jsonl" in err, err


def test_what_is_derived_is_built_again_without_a_word(own, capsys, monkeypatch):
    for kind in ("embeddings", "assignments", "encoder"):
        monkeypatch.setitem(formats.FORMATS, kind, 2)
    code, out, err = call(capsys, own, "cluster", "--k", "4")
    assert code == 0 and "fitting the encoder lsi" in out, err
    assert load_manifest(own.root / "clusters" / "4" / "notes" / "train", "assignments")["info"] is not None


def test_rows_laid_out_otherwise_are_another_run(own, capsys, monkeypatch):
    monkeypatch.setattr(formats, "ROWS", 2)
    code, _, err = call(capsys, own, "pretrain")
    assert code == 1 and "rows in the layout 1, and this version lays them out as 2: train it again with --fresh" in err
    assert call(capsys, own, "pretrain", "--fresh")[0] == 0
    assert find_run(own, "slm").record["inputs"]["rows"] == 2


def test_a_number_from_the_future(tmp_path):
    with new_artifact(tmp_path / "x", "model", {"a": 1}) as (folder, _):
        (folder / "a").write_text("b")
    file = tmp_path / "x" / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["inputs"][formats.KEY] = 7
    del manifest["checksum"]
    file.write_text(json.dumps(manifest | {"checksum": fingerprint(manifest)}))
    with pytest.raises(formats.OtherFormat, match="has format 7 of a model, this version reads 1"):
        load_manifest(tmp_path / "x", "model")

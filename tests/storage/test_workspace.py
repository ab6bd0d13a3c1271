import os

import numpy as np
import pytest

from mlx_slm.errors import SlmError
from mlx_slm.files import Damaged
from mlx_slm.storage import artifacts as w
from mlx_slm.storage.mapped import MappedFile
from mlx_slm.storage.workspace import Workspace


def make(path, content=b"abc", inputs=None, mapped=()):
    with w.new_artifact(path, "thing", inputs or {}, mapped) as (directory, info):
        (directory / "a.bin").write_bytes(content)
        info["n"] = 1
    return w.load_manifest(path, "thing")


def test_an_artifact_that_fails_leaves_the_old_one_and_no_rubbish(tmp_path):
    make(tmp_path / "x", b"old")
    with pytest.raises(RuntimeError), w.new_artifact(tmp_path / "x", "thing", {}) as (directory, _):
        (directory / "a.bin").write_bytes(b"new")
        raise RuntimeError
    assert (tmp_path / "x" / "a.bin").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_replacement_cut_off_between_its_renames_is_undone(tmp_path):
    make(tmp_path / "x", b"old")
    os.rename(tmp_path / "x", tmp_path / ".x.old")
    assert w.load_manifest(tmp_path / "x", "thing")["info"] == {"n": 1}


@pytest.mark.parametrize("harm", ["truncate", "remove", "manifest", "flip"])
def test_damage_is_noticed_and_named(tmp_path, harm):
    path = tmp_path / "x"
    make(path, b"abcdef")
    file = path / "a.bin"
    if harm == "truncate":
        file.write_bytes(b"abc")
    elif harm == "remove":
        file.unlink()
    elif harm == "manifest":
        (path / "manifest.json").write_text((path / "manifest.json").read_text().replace('"n": 1', '"n": 2'))
    else:
        file.write_bytes(b"abcdeF")
    with pytest.raises(Damaged, match="manifest.json" if harm == "manifest" else "a.bin"):
        w.verify(path, w.load_manifest(path, "thing"))


def test_without_a_manifest_it_does_not_exist(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(SlmError, match="holds no thing"):
        w.load_manifest(tmp_path / "x", "thing")


def test_mapped_blocks_are_checked_when_first_touched(tmp_path):
    values = np.arange(3 * w.BLOCK // 4 + 10, dtype="<u4")
    manifest = make(tmp_path / "x", values.tobytes(), mapped=("a.bin",))
    file = tmp_path / "x" / "a.bin"
    with open(file, "r+b") as opened:
        opened.seek(2 * w.BLOCK + 5)
        opened.write(b"\xff")
    mapped = MappedFile(file, "<u4", manifest["files"]["a.bin"])
    block = w.BLOCK // 4
    assert (mapped[: 2 * block] == values[: 2 * block]).all()
    assert mapped[-1] == values[-1]
    with pytest.raises(Damaged, match="a.bin is damaged in bytes"):
        mapped[2 * block - 1 : 2 * block + 1]
    starts = np.array([2 * block - 8, 0, len(values) - 7])
    expected = [values[start : start + 7] for start in starts]
    assert (mapped.read_each(starts, 7) == expected).all() and mapped.read_each(starts[:0], 7).shape == (0, 7)
    assert (mapped.read(5, 9000) == values[5:9000]).all()
    for over_the_edge in (lambda: mapped.read_each(starts, 9), lambda: mapped.read(2 * block - 1, 2 * block + 1)):
        with pytest.raises(Damaged, match="a.bin is damaged in bytes"):
            over_the_edge()
    os.truncate(file, 3 * block)
    for beyond in (lambda: mapped.read_each(starts, 7), lambda: mapped.read(0, 5)):
        with pytest.raises(Damaged, match="was cut off"):
            beyond()
    with pytest.raises(Damaged):
        w.verify(tmp_path / "x", manifest)


def test_an_empty_file_can_be_mapped(tmp_path):
    manifest = make(tmp_path / "x", b"", mapped=("a.bin",))
    assert len(MappedFile(tmp_path / "x" / "a.bin", "<u4", manifest["files"]["a.bin"])) == 0


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "", ".", "..", "-x", ".hidden"])
def test_names_are_not_paths(tmp_path, name):
    made = Workspace(tmp_path)
    for place in (made.run, made.model, lambda n: made.data(n, "train")):
        with pytest.raises(SlmError, match="is not a name"):
            place(name)


def test_a_disk_that_ignores_case_has_one_directory_for_two_names(tmp_path, monkeypatch):
    """Imitated: the directory is found under a name that its folder does not list."""
    workspace = Workspace(tmp_path)
    for folder in ("runs", "models", "adapters", "data"):
        (tmp_path / folder / "SLM").mkdir(parents=True)
    assert workspace.run("SLM").name == "SLM" and workspace.run("slm").name == "slm", "two where case counts"
    monkeypatch.setattr(os, "listdir", lambda folder: ["slm"])
    for where in (workspace.run, workspace.model, workspace.adapter, lambda name: workspace.data(name, "train")):
        with pytest.raises(SlmError, match=r"'SLM' is 'slm' in .* on this disk, which ignores case: choose another"):
            where("SLM")
        where("new")


def test_fingerprints_follow_the_content(tmp_path):
    first, same, other = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", b"abd")
    assert first["fingerprint"] == same["fingerprint"] != other["fingerprint"]
    big = tmp_path / "big"
    big.write_bytes(bytes(65 << 20))
    before = w.file_fingerprint(big)
    with open(big, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"x")
    assert w.file_fingerprint(big) != before

"""A bundle from anybody: nothing outside the workspace is created, changed or read, and each gets one sentence."""

import contextlib
import json
import os
import random
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import call
from safetensors.numpy import load_file, save_file

from mlx_slm.errors import SlmError
from mlx_slm.files import Damaged
from mlx_slm.storage.artifacts import MANIFEST, block_checksums, sha256
from mlx_slm.storage.records import fingerprint
from mlx_slm.storage.workspace import Workspace

SECRET = "what only the receiver has: 4711"
MUTATED = 300


@pytest.fixture(scope="module")
def bundle(with_experts, tmp_path_factory) -> Path:
    from mlx_slm.experts.handover import export_bundle
    from mlx_slm.training.find import find_run

    path = tmp_path_factory.mktemp("handed") / "bundle"
    export_bundle(with_experts, find_run(with_experts, "pn"), path)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch, texts) -> Path:
    """A receiver: home/.profile, home/Documents, and a workspace two levels below."""
    home = tmp_path / "home"
    (home / "Documents").mkdir(parents=True)
    (home / ".profile").write_text(SECRET)
    (home / "Documents" / "thesis.txt").write_text(SECRET)
    (home / "notes").mkdir()
    for number, text in enumerate(texts[:120]):
        (home / "notes" / f"{number}.md").write_text(text)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return home


def signed(directory: Path) -> None:
    """Make the hashes of a changed bundle consistent: every manifest and record from the inside out."""
    manifests = sorted(directory.rglob(MANIFEST), key=lambda path: -len(path.parts))
    for path in directory.rglob("run.json"):
        resign_record(path)
    for path in filter(Path.is_file, manifests):
        try:
            manifest = json.loads(path.read_text())
            entries = manifest["files"].items()
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for name, entry in entries:
            file = path.parent / name
            if isinstance(entry, dict) and file.is_file() and not os.path.isabs(name):
                entry["bytes"] = file.stat().st_size
                if "sha256" in entry:
                    entry["sha256"] = sha256(file)
                elif isinstance(entry.get("block"), int) and entry["block"] > 0:
                    entry["crc32"] = block_checksums(file, entry["block"])
        sign(path, manifest)


def sign(path: Path, manifest: dict) -> None:
    manifest["checksum"] = fingerprint({key: value for key, value in manifest.items() if key != "checksum"})
    path.write_text(json.dumps(manifest))


def resign_record(path: Path) -> None:
    if not path.is_file():
        return
    try:
        record = json.loads(path.read_text())
        record.pop("checksum", None)
        path.write_text(json.dumps(record | {"checksum": fingerprint(record)}))
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass


def edit(path: Path, change) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def state_of(home: Path, workspace: Path) -> dict:
    """Everything below a folder but the workspace: kind, size, time of change, bytes."""
    found = {}
    for path in sorted(home.rglob("*")):
        if path == workspace or workspace in path.parents:
            continue
        told = path.lstat()
        is_file = stat.S_ISREG(told.st_mode)
        found[str(path)] = (told.st_mode, told.st_mtime_ns, path.read_bytes() if is_file else None)
    return found


def take(capsys, home: Path, bundle: Path, number: int = 0) -> tuple[int, str]:
    """Specialise from a bundle, in a fresh workspace; asserts what must hold whatever the bundle is."""
    workspace = home / "work" / f"w{number}"
    before = state_of(home, home / "work")
    code, _, err = call(capsys, Workspace(workspace), "specialize", "--domain", "mine", "--from", str(bundle), "notes")
    assert state_of(home, home / "work") == before
    inside = b"".join(path.read_bytes() for path in workspace.rglob("*") if path.is_file())
    assert SECRET.encode() not in inside
    assert "Traceback" not in err
    assert code == 0 or (code == 1 and err.startswith("mlx-slm: error: ") and err.count("\n") == 1), err
    shutil.rmtree(home / "work", ignore_errors=True)
    return code, err


def attacked(bundle: Path, home: Path) -> Path:
    copy = home / "attack"
    shutil.copytree(bundle, copy)
    return copy


def add_tokenizer_file(name: str):
    def change(bundle: Path) -> None:
        path = bundle / "tokenizer" / MANIFEST
        edit(path, lambda found: found["files"].update({name: found["files"]["tokenizer.json"]}))
        target = path.parent / name
        if not os.path.lexists(target) and ".." in name:
            os.makedirs(os.path.dirname(os.path.normpath(target)), exist_ok=True)

    return change


def replace_by_link(name: str, target: str):
    def change(bundle: Path) -> None:
        path = bundle / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(target)

    return change


def info(**changes):
    return lambda bundle: edit(bundle / MANIFEST, lambda found: found["info"].update(changes))


def record(*place, value):
    def change(bundle: Path) -> None:
        def set_(found):
            for key in place[:-1]:
                found = found[key]
            found[place[-1]] = value

        edit(bundle / "run.json", set_)

    return change


def garbage(pattern: str, data: bytes):
    return lambda bundle: next(bundle.glob(pattern)).write_bytes(data)


def weights(value: float):
    """Weights of the right shapes that no training ever gave."""

    def change(bundle: Path) -> None:
        file = next(bundle.glob("checkpoints/*/model.safetensors"))
        found = load_file(file)
        save_file({name: np.full_like(array, value) for name, array in found.items()}, file)

    return change


def config(text: str):
    return lambda bundle: (bundle / "config.yaml").write_text(text)


def other_encoder(**facts):
    """Clusters that were made with an encoder which is a folder of the receiver's."""

    def change(bundle: Path) -> None:
        shutil.rmtree(bundle / "encoder")
        edit(bundle / MANIFEST, lambda found: found.update(files=without(found["files"], "encoder/")))
        clusters = next(bundle.glob("clusters/*")) / MANIFEST
        edit(clusters, lambda found: found["inputs"].update(embeddings={"long_windows": "mean", "store": "x", **facts}))
        edit(bundle / MANIFEST, lambda found: found["info"].update(encoder={"long_windows": "mean", **facts}))
        text = (bundle / "config.yaml").read_text().replace("encoder: lsi", "encoder: Documents/enc")
        (bundle / "config.yaml").write_text(text)

    return change


def without(files: dict, prefix: str) -> dict:
    return {name: entry for name, entry in files.items() if not name.startswith(prefix)}


def unlisted(bundle: Path) -> None:
    (bundle / "tokenizer" / "evil.py").write_text("evil")
    entry = {"bytes": 4, "sha256": sha256(bundle / "tokenizer" / "evil.py")}
    edit(bundle / "tokenizer" / MANIFEST, lambda found: found["files"].update({"evil.py": entry}))


def other_dimensions(bundle: Path) -> None:
    folder = next(bundle.glob("clusters/*"))
    save_file({"centroids": np.ones((4, 5), np.float32)}, folder / "centroids.safetensors")
    edit(folder / MANIFEST, lambda found: found["info"].update(dims=5))


ATTACKS = {
    "an encoder that is a folder of the receiver's": other_encoder(encoder="enc", files="0" * 64),
    "an encoder that does not say its files": other_encoder(encoder="Documents"),
    "a file that only an inner manifest lists": unlisted,
    "centroids of other dimensions": other_dimensions,
    "an epsilon of zero": record("inputs", "shape", "norm_eps", value=0),
    "a context of one token": record("inputs", "shape", "context_length", value=1),
    "a tokenizer that overwrites ~/.profile": add_tokenizer_file("../../../.profile"),
    "an absolute name": add_tokenizer_file("/etc/passwd"),
    "a device": add_tokenizer_file("/dev/zero"),
    "a name with a backslash": add_tokenizer_file("..\\..\\x"),
    "k is a path": info(k="../../../Documents"),
    "k is negative": info(k=-1),
    "k is a truth": info(k=True),
    "a method that does not exist": info(method="rm"),
    "info is a list": lambda bundle: edit(bundle / MANIFEST, lambda found: found.update(info=[])),
    "files is a list": lambda bundle: edit(bundle / "tokenizer" / MANIFEST, lambda found: found.update(files=[])),
    "no inputs": lambda bundle: edit(bundle / "tokenizer" / MANIFEST, lambda found: found.pop("inputs")),
    "a link to a file of the receiver's": replace_by_link("tokenizer/tokenizer.json", "../../.profile"),
    "a folder that is a link": replace_by_link("encoder", "../Documents"),
    "weights that are a link": replace_by_link("checkpoints", "../Documents"),
    "a run of another method": record("method", value="x"),
    "a run named ../../x": record("name", value="../../x"),
    "a shape of no family": record("inputs", "shape", "family", value="mamba"),
    "a million layers": record("inputs", "shape", "num_layers", value=1_000_000),
    "half a head": record("inputs", "shape", "num_heads", value=2.5),
    "a step that is text": record("step", value="../../../.profile"),
    "other clusters' tokens": record("inputs", "generic", value=[1, 2]),
    "a run that began with another": record("inputs", "from", value={"run": "slm", "step": 1, "identity": "x"}),
    "importance": record("inputs", "importance", value={}),
    "a projection that is none": record("inputs", "projection", value={"k": 4, "h": "many"}),
    "a model that is garbage": garbage("tokenizer/tokenizer.model", b"garbage" * 99),
    "a tokenizer.json that is garbage": garbage("tokenizer/tokenizer.json", b"{}"),
    "centroids that are garbage": garbage("clusters/*/centroids.safetensors", b"\xff" * 64),
    "weights that are garbage": garbage("checkpoints/*/model.safetensors", b"\x08" + b"\0" * 7 + b"{}      "),
    "weights that are no numbers": weights(float("nan")),
    "weights that overflow": weights(1e38),
    "an encoder that is garbage": garbage("encoder/*/lsi.safetensors", b"PK\x03\x04"),
    "a record that is a list": garbage("run.json", b"[]"),
    "a record of 100,000 brackets": garbage("run.json", b"[" * 100_000),
    "a configuration that is none": config("data: [1, 2]"),
    "a configuration of aliases": config("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{c}: &{c} [{','.join(['*' + b] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True))),
    "a configuration with an object": config("data: !!python/object/apply:os.system ['touch hacked']"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gets_one_sentence_and_touches_nothing(name, bundle, home, capsys):
    copy = attacked(bundle, home)
    ATTACKS[name](copy)
    signed(copy)
    code, err = take(capsys, home, copy)
    assert code == 1 and len(err) < 600, err


def test_a_configuration_does_not_choose_files_of_the_receiver(bundle, home, capsys):
    from mlx_slm.config.files import load_config
    from mlx_slm.experts.bundle import install_bundle
    from mlx_slm.report import Report

    copy = attacked(bundle, home)
    text = (copy / "config.yaml").read_text()
    text = text.replace("encoder: lsi", f"encoder: {home / 'Documents'}").replace(
        "sets: {}", f"sets: {{mine: ['{home / '.profile'}']}}"
    )
    (copy / "config.yaml").write_text(text)
    signed(copy)
    install_bundle(Workspace(home / "work"), copy, Report())
    taken = load_config(home / "work" / "config.yaml")
    assert taken.data.sets == {} and str(home) not in (home / "work" / "config.yaml").read_text()


def test_pipes_and_sockets_are_not_waited_for(bundle, home):
    from mlx_slm.experts.bundle import checked

    for name in ("config.yaml", MANIFEST, "README.md"):
        copy = attacked(bundle, home)
        (copy / name).unlink()
        os.mkfifo(copy / name)
        with pytest.raises(SlmError, match="a pipe"):
            checked(copy)
        shutil.rmtree(copy)


def test_what_changed_after_it_was_installed_is_noticed(bundle, home, capsys):
    copy, workspace = attacked(bundle, home), Workspace(home / "work")
    arguments = ("specialize", "--domain", "mine", "--from", str(copy), "notes")
    assert call(capsys, workspace, *arguments)[0] == 0
    edit(copy / "run.json", lambda found: found["inputs"]["generic"].reverse())
    resign_record(copy / "run.json")
    code, _, err = call(capsys, workspace, *arguments, "--name", "again")
    assert code == 1 and "run.json" in err and "were written" in err


VALUES = [
    None,
    True,
    -1,
    0,
    2**63,
    1e308,
    "",
    "..",
    "../x",
    "/dev/zero",
    "a" * 300,
    "\0",
    [],
    {},
    [[]],
    {"a": 1},
    0.5,
    "4",
]


def mutated(bundle: Path, rng: random.Random) -> None:
    """One to three random changes of a bundle: of JSON values, names, bytes, sizes, links; mostly signed again."""
    for _ in range(rng.randint(1, 3)):
        files = sorted(path for path in bundle.rglob("*") if path.is_file() and not path.is_symlink())
        path = rng.choice(files)
        kind = rng.randrange(8)
        if path.suffix == ".json" and kind < 5:
            value = None
            with contextlib.suppress(ValueError):  # damaged by a change before
                value = (
                    json.loads(path.read_bytes().decode("utf-8", "replace")) if path.stat().st_size < 1 << 20 else None
                )
            path.write_text(json.dumps(mutate_json(value, rng)))
        elif kind == 5:
            path.unlink()
            instead = rng.choice(["a link", "a folder", "a pipe", "nothing"])
            if instead == "a link":
                path.symlink_to("/dev/zero")
            elif instead == "a folder":
                path.mkdir()
            elif instead == "a pipe":
                os.mkfifo(path)
        elif kind == 6:
            path.rename(path.with_name(rng.choice(["x", "a" * 200, "run.json.bak", "..x", path.name + " "])))
        else:
            data = bytearray(path.read_bytes())
            for _ in range(rng.randint(1, 4)):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data[: rng.choice([len(data), len(data) // 2, 0])])
    if rng.random() < 0.8:
        signed(bundle)


def mutate_json(value, rng: random.Random):
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return rng.choice(VALUES)
    if isinstance(value, dict):
        key = rng.choice(sorted(value))
        changed = dict(value)
        if rng.random() < 0.2:
            changed[rng.choice(["../" + key, "/dev/zero", key + "x"])] = changed.pop(key)
        else:
            changed[key] = mutate_json(value[key], rng)
        return changed
    place = rng.randrange(len(value))
    return [*value[:place], mutate_json(value[place], rng), *value[place + 1 :]]


def test_hundreds_of_mutated_bundles(bundle, home, monkeypatch):
    """Nothing outside the workspace is created, changed or opened; a bundle is sound, or refused in one sentence."""
    from mlx_slm.experts.bundle import find_source, install_bundle
    from mlx_slm.report import Report

    opened: list[str] = []
    watching = [True]

    def watch(event, arguments):
        if watching and event in ("open", "os.rename", "os.remove", "shutil.rmtree", "os.symlink", "os.link"):
            opened.extend(str(one) for one in arguments if isinstance(one, str | os.PathLike))

    sys.addaudithook(watch)
    rng, taken, before = random.Random(14), 0, None
    before = state_of(home, home / "work")
    for number in range(MUTATED):
        copy = home / "work" / "attack"
        shutil.copytree(bundle, copy)
        mutated(copy, rng)
        workspace = Workspace(home / "work" / "w")
        opened.clear()
        try:
            install_bundle(workspace, copy, Report())
            find_source(workspace, str(copy)).weights()
            taken += 1
        except SlmError as error:
            assert "\n" not in str(error) and len(str(error)) < 800, error
        except OSError as error:
            raise AssertionError(f"number {number}") from error
        touched = [path for path in opened if path.startswith(str(home)) and str(home / "work") not in path]
        assert not touched and not [path for path in opened if path.startswith("/dev/")], (number, touched)
        shutil.rmtree(home / "work")
    watching.clear()
    assert state_of(home, home / "work") == before
    assert taken < MUTATED / 4, "most mutations matter"


def test_no_path_of_the_sender_gets_into_the_configuration(bundle, home):
    from mlx_slm.experts.bundle import install_bundle
    from mlx_slm.report import Report

    copy = attacked(bundle, home)
    edit(copy / "tokenizer" / MANIFEST, lambda found: found["inputs"]["settings"].update(path="~/Documents"))
    signed(copy)
    install_bundle(Workspace(home / "work"), copy, Report())
    assert "Documents" not in (home / "work" / "config.yaml").read_text()


@pytest.mark.parametrize("change", [{"status": "running"}, {"select": "best"}, {"method": "lora"}, {"step": None}])
def test_the_record_of_an_expert_is_checked_as_that_of_a_run(change, with_experts, tmp_path):
    from mlx_slm.experts.bundle import checked
    from mlx_slm.experts.handover import export_bundle
    from mlx_slm.training.find import find_run

    copy = tmp_path / "mix"
    export_bundle(with_experts, find_run(with_experts, "mix"), copy)
    edit(copy / "expert-1" / "run.json", lambda found: found.update(change))
    signed(copy)
    with pytest.raises(SlmError, match=r"expert-1"):
        checked(copy)


def test_forms_name_the_place(bundle, tmp_path):
    from mlx_slm.experts.bundle import checked

    copy = tmp_path / "b"
    shutil.copytree(bundle, copy)
    record("inputs", "shape", "dims", value=0)(copy)
    signed(copy)
    with pytest.raises(Damaged, match=r"run\.json.*inputs\.shape\.dims"):
        checked(copy)


@pytest.mark.parametrize("value", [1 << 22, 1 << 20, 4096])
@pytest.mark.parametrize("key", ["dims", "hidden_dims", "vocab_size", "context_length", "num_layers"])
def test_a_shape_beyond_reason_takes_neither_memory_nor_time(key, value, bundle, tmp_path):
    from mlx_slm.experts.bundle import checked

    copy = tmp_path / "b"
    shutil.copytree(bundle, copy)
    record("inputs", "shape", key, value=value)(copy)
    signed(copy)
    with pytest.raises(SlmError) as caught:
        checked(copy)
    assert "\n" not in str(caught.value)


def test_mutated_mixtures(with_experts, home):
    from mlx_slm.experts.bundle import find_source, install_bundle
    from mlx_slm.experts.experts import Experts
    from mlx_slm.experts.handover import export_bundle
    from mlx_slm.report import Report
    from mlx_slm.training.find import find_run

    bundle, rng, refused = home / "mix", random.Random(15), 0
    export_bundle(with_experts, find_run(with_experts, "mix"), bundle)
    for _ in range(30):
        copy, workspace = home / "work" / "attack", Workspace(home / "work" / "w")
        shutil.copytree(bundle, copy)
        mutated(copy, rng)
        try:
            install_bundle(workspace, copy, Report())
            experts = Experts(workspace, find_source(workspace, str(copy)))
            for number in experts.trained:
                experts.parameters(number)
        except SlmError as error:
            refused += 1
            assert "\n" not in str(error), error
        shutil.rmtree(home / "work")
    assert refused > 15

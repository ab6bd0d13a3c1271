"""Files that change under the program, and ends that it does not choose."""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import call, copy_of, small_config, write_jsonl

from mlx_slm.cli import OUT_OF_MEMORY
from mlx_slm.files import Damaged
from mlx_slm.machine import runtime
from mlx_slm.project import Project
from mlx_slm.storage.records import append_json, count_damaged_lines, read_json_lines, read_record, write_record
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text import prepare as p
from mlx_slm.text.rows import Sampler, Stream
from mlx_slm.text.shards import read_shard, save_shard
from mlx_slm.text.store import Store
from mlx_slm.training.checkpoint import Metrics
from mlx_slm.training.find import find_run
from mlx_slm.training.runs import verify_run

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and pidfd are Linux's")


@pytest.mark.parametrize("name", ["tokens.bin", "windows.npy"])
@pytest.mark.parametrize("keep", [0, 0.3, 0.9])
def test_a_store_that_is_cut_off_in_use_is_noticed(name, keep, prepared, tmp_path):
    own = copy_of(prepared, tmp_path / "w")
    store = Store(own.data("generic", "train"))
    sampler = Sampler([Stream.of(store, np.arange(store.num_windows))], np.ones(1), 8, seed=0)
    sampler.rows(0)
    path = own.data("generic", "train") / name
    os.truncate(path, int(keep * path.stat().st_size))
    with pytest.raises(Damaged, match=f"{name} was cut off while it was in use"):
        for step in range(1, 200):
            sampler.rows(step)
            store.windows[:]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "a list of pickles"])
def test_a_damaged_shard_of_an_interrupted_run_is_rebuilt(damage, tmp_path, texts, monkeypatch, report):
    config, source = small_config(), write_jsonl(tmp_path / "a.jsonl", texts)
    monkeypatch.setattr("mlx_slm.text.shards.SHARD_BYTES", 40_000)
    whole, own = Workspace(tmp_path / "whole"), Workspace(tmp_path / "w")
    p.prepare(Project(whole, config, report), p.Preparation("generic", [str(source)]))
    with monkeypatch.context() as patch:
        patch.setattr(p, "merge_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            p.prepare(Project(own, config, report), p.Preparation("generic", [str(source)]))
    shard = sorted((own.root / "data" / "generic" / ".partial").glob("train-*.npz"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    changed = {"cut": data[: len(data) // 3], "flip": data, "empty": b"", "a list of pickles": b"\x80\x04]\x94."}[
        damage
    ]
    shard.write_bytes(changed)
    p.prepare(Project(own, config, report), p.Preparation("generic", [str(source)]))
    for split in ("train", "valid", "test"):
        assert Store(own.data("generic", split)).fingerprint == Store(whole.data("generic", split)).fingerprint


def test_any_flipped_bit_of_a_shard_is_noticed_or_changes_nothing(tmp_path):
    whole = {"tokens": np.arange(40, dtype=np.uint16), "lengths": np.array([15, 25]), "bytes": np.array(99)}
    path = tmp_path / "train-00001.npz"
    save_shard(path, **whole)
    data, noticed = path.read_bytes(), 0
    for bit in range(0, 8 * len(data), 3):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = read_shard(path, *whole)
        except Damaged:
            noticed += 1
        else:
            assert all((a == b).all() for a, b in zip(found, whole.values(), strict=True))
    assert noticed > 0.3 * 8 * len(data) / 3


@pytest.mark.parametrize("what", ["another's place", "a pipe", "a folder", "a link to nothing"])
def test_what_is_no_shard_is_no_shard(tmp_path, what):
    path, other = tmp_path / "train-00001.npz", tmp_path / "train-00000.npz"
    save_shard(other, tokens=np.arange(4))
    {
        "another's place": lambda: shutil.copy(other, path),
        "a pipe": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "a link to nothing": lambda: path.symlink_to("nowhere"),
    }[what]()
    with pytest.raises(Damaged, match=r"train-00001\.npz (was written as train-00000|is damaged)"):
        read_shard(path, "tokens")


def test_any_flipped_bit_of_a_record_is_noticed(with_experts, tmp_path, capsys):
    """Of a run's record, its configuration and its report of importance; half of the flips leave JSON or YAML."""
    own, rng = copy_of(with_experts, tmp_path / "w"), random.Random(0)
    for name in ("run.json", "config.yaml"):
        path = own.run("slm") / name
        good = path.read_bytes()
        for _ in range(60):
            data = bytearray(good)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            with pytest.raises(Damaged, match=name.replace(".", r"\.")):
                verify_run(own.run("slm"))
        path.write_bytes(good)
    verify_run(own.run("slm"))
    record = find_run(own, "slm").record
    record["valid_nll"] -= 1e-9
    (own.run("slm") / "run.json").write_text(json.dumps(record | {"checksum": "0" * 64}))
    code, _, err = call(capsys, own, "info", "--verify")
    assert code == 1 and "run.json was changed after it was written" in err
    code, _, err = call(capsys, own, "specialize", "--domain", "notes", "--from", "slm")
    assert code == 1 and err.count("\n") == 1 and "run.json was changed" in err


@pytest.mark.parametrize("value", [{"a": 1.5, "b": [None, "ä\ud800"], "c": {"3": 1e-300}}, {}, {3: 4, 20: 1, 1: 2}])
def test_records_come_back_as_they_were(value, tmp_path):
    write_record(tmp_path / "r.json", value)
    assert read_record(tmp_path / "r.json") == json.loads(json.dumps(value))


def test_damaged_lines_are_counted_and_a_cut_off_one_is_not(tmp_path, report):
    file = tmp_path / "metrics.jsonl"
    for step in range(1, 9):
        append_json(file, {"step": step, "loss": 1 / step})
    lines = file.read_bytes().splitlines(keepends=True)
    flipped = bytearray(b"".join(lines))
    for line in (2, 5):
        start = sum(map(len, lines[:line]))
        flipped[start + 12] ^= 1
    file.write_bytes(bytes(flipped) + b'{"step": 9, "lo')
    assert count_damaged_lines(file) == 2
    assert [one["step"] for one in read_json_lines(file, report)] == [1, 2, 4, 5, 7, 8]
    assert report.warnings == [f"{file}: 2 damaged lines are left out"]
    metrics = Metrics(tmp_path, 7, report)
    metrics.write({"step": 8, "loss": 0.5})
    assert [one["step"] for one in read_json_lines(file)] == [1, 2, 4, 5, 7, 8] and not count_damaged_lines(file)


@linux
def test_workers_end_with_their_parent():
    """The parent is killed and can tell nobody."""
    child = (
        "import os; from mlx_slm.machine import runtime; "
        "runtime.end_with({parent}); print(os.getpid(), flush=True); input()"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"child = {child!r}.format(parent=os.getpid())\n"
        "subprocess.run([sys.executable, '-c', child], stdin=subprocess.PIPE)"
    )
    started = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    worker = os.pidfd_open(int(started.stdout.readline()))
    started.send_signal(signal.SIGSTOP)
    assert not select.select([worker], [], [], 0)[0], "it lives as long as its parent does"
    started.kill()
    started.wait()
    assert select.select([worker], [], [], 20)[0]


@linux
@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL])
def test_the_last_words_of_a_process_that_the_system_ends(number):
    script = (
        "import os, sys; sys.argv[1:] = ['pretrain']\n"
        "from mlx_slm import cli\n"
        f"cli.run = lambda _: os.kill(os.getpid(), {int(number)})\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -number and OUT_OF_MEMORY in done.stderr and done.stderr.count("\n") == 1


@linux
def test_it_ends_as_ever_where_who_would_say_them_was_killed_too():
    script = (
        "import os, signal, sys; sys.argv[1:] = ['pretrain']\n"
        "from mlx_slm import cli\n"
        "fork = os.fork\n"
        "def killed():\n"
        "    watcher = fork()\n"
        "    if watcher: os.kill(watcher, signal.SIGKILL); os.waitid(os.P_PID, watcher, os.WEXITED | os.WNOWAIT)\n"
        "    return watcher\n"
        "os.fork, cli.run = killed, lambda _: 3\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 3 and not done.stderr


@linux
def test_a_limit_of_memory_is_known():
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "from mlx_slm.machine import runtime; print(runtime.memory_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 1 << 30 < int(done.stdout) < 3 << 30 < runtime.memory_bytes()

"""Values are checked where they enter: seeds, hours, tildes, prompts, the width of a terminal."""

import json
import os
import subprocess
import sys

import pytest
from conftest import call, copy_of, small_config, write_jsonl
from rich.console import Console

from mlx_slm.cli import display, run
from mlx_slm.config.files import dump_config
from mlx_slm.storage.locks import alone
from mlx_slm.storage.workspace import Workspace


@pytest.mark.parametrize("seed", ["-1", "-9" * 30, str(2**32), str(2**64), "0.5", "x"])
def test_a_seed_is_a_number_from_0_on(seed, with_experts, capsys):
    assert run(["generate", "slm", "-p", "x", "--seed", seed]) == 2
    assert "--seed" in capsys.readouterr().err
    for key in ("data", "tokenizer", "clusters", "training", "finetuning"):
        code, _, err = call(capsys, with_experts, "pretrain", "--set", f"{key}.seed={seed}", "--name", "seeded")
        assert code == 1 and f"{key}.seed" in err and "Traceback" not in err
    assert not with_experts.run("seeded").exists()


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "inf", "x"])
def test_hours_are_never_dropped_without_a_word(hours, with_experts, capsys):
    code, _, err = call(capsys, with_experts, "pretrain", "--hours", hours, "--name", "hours")
    assert code == 2 and "--hours" in err and not with_experts.run("hours").exists()


def test_a_tilde_is_the_home_directory_everywhere(tmp_path, texts, monkeypatch, capsys):
    home = tmp_path / "home"
    here = tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    write_jsonl(home / "a.jsonl", texts[:300])
    (home / "tiny.yaml").write_text(dump_config(small_config()))
    assert run(["prepare", "generic", "train=~/a.jsonl", "--config=~/tiny.yaml", "--workspace=~/one"]) == 0
    monkeypatch.setenv("MLX_SLM_WORKSPACE", "~/two")
    assert run(["prepare", "generic", "~/a.jsonl", "--config", "~/tiny.yaml"]) == 0
    assert Workspace("~/one").sets() == Workspace(home / "two").sets() == ["generic"]
    code = run(["pretrain", "--method", "is", "--weights=~/gone.yaml", "--workspace=~/one"])
    assert code == 1 and f"{home}/gone.yaml" in capsys.readouterr().err
    assert run(["generate", "~/no-model", "-p", "x"]) == 1 and "no model" in capsys.readouterr().err
    assert list(here.iterdir()) == [], "no folder is named ~"


PROMPTS = {
    "Latin-1": (b"caf\xe9 by the river", 0, "replaced invalid UTF-8"),
    "UTF-16": ("a prompt that is long enough".encode("utf-16-le"), 1, "looks like UTF-16LE"),
    "Russian": ("Съешь же ещё этих мягких французских булок да выпей чаю.".encode("cp1251"), 1, "looks like"),
    "a mark": (b"\xef\xbb\xbfa mark in front", 0, ""),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_that_is_not_utf8(name, with_experts):
    raw, code, message = PROMPTS[name]
    command = [sys.executable, "-m", "mlx_slm", "generate", "slm", "--workspace", str(with_experts.root), "-m", "2"]
    if name != "Latin-1":
        done = subprocess.run([*command, "-p", "-"], input=raw, capture_output=True)
    else:
        done = subprocess.run([*map(os.fsencode, command), b"-p", raw], capture_output=True)
    assert done.returncode == code and message.encode() in done.stderr and b"Traceback" not in done.stderr, done.stderr


def test_a_file_whose_name_is_not_utf8(tmp_path, texts, capsys):
    name = os.fsdecode(b"caf\xe9.jsonl")
    try:
        write_jsonl(tmp_path / name, texts[:300])
    except OSError:
        pytest.skip("this disk takes UTF-8 names only")
    (tmp_path / "tiny.yaml").write_text(dump_config(small_config()))
    workspace = Workspace(tmp_path / "w")
    for _ in range(2):
        code, _, err = call(
            capsys, workspace, "prepare", "generic", str(tmp_path / name), "--config", str(tmp_path / "tiny.yaml")
        )
        assert code == 0, err


@pytest.mark.parametrize("width", [30, 60, 200])
def test_a_narrow_terminal_gets_a_narrow_table_and_never_less(width, monkeypatch, capsys):
    monkeypatch.setattr(display, "Console", lambda **options: Console(width=width, force_terminal=True, **options))
    cells = [
        "notes-pn-histogram-250k",
        "stackexchange",
        "1,234,567",
        "3.2109 ± 0.0123",
        "24.80",
        "1.2345",
    ]
    columns = ["model", "set", "tokens", "nats per token", "perplexity", "bits per byte"]
    display.RichReport().table("test sets", columns, [cells, cells])
    out = capsys.readouterr().out
    assert all(out.count(cell) >= 2 for cell in cells) and all(column in out for column in columns) and "…" not in out


def test_the_end_of_the_input_at_a_question_is_a_no(monkeypatch):
    report = display.RichReport()

    class Asking:
        is_terminal = is_interactive = True

        def input(self, question):
            raise EOFError

    report.console = Asking()
    assert report.confirm("start?") is False


def test_an_end_of_file_inside_is_no_interruption(with_experts, monkeypatch):
    def broken(*_):
        raise EOFError("inside")

    monkeypatch.setattr("mlx_slm.machine.runtime.describe", broken)
    with pytest.raises(EOFError, match="inside"):
        run(["info", "--workspace", str(with_experts.root)])


@pytest.mark.parametrize("rate", [3.0, 30.0, 100.0])
def test_fine_tuning_that_harms_keeps_its_start(rate, with_experts, tmp_path, capsys):
    own = copy_of(with_experts, tmp_path / "w")
    code, out, err = call(
        capsys, own, "specialize", "--domain", "notes", "--set", f"finetuning.learning_rate={rate}", "--json"
    )
    assert code == 0 and "worse than its start, which is kept" in err, err
    assert json.loads(out)["step"] == 0


@pytest.mark.parametrize("expert", [[], ["--expert", "0"]])
def test_a_setting_that_means_nothing_is_refused(expert, with_experts, capsys):
    code, _, err = call(capsys, with_experts, "evaluate", "pn", "--domain", "notes", "--domain-tokens", "2k", *expert)
    assert code == 2 and "--domain-tokens is for --expert frequent" in err


def test_two_terminals_export_one_bundle(with_experts, tmp_path, capsys):
    with alone(tmp_path / ".bundle.lock", "busy"):
        code, _, err = call(capsys, with_experts, "export", "pn", "--bundle", str(tmp_path / "bundle"))
        assert code == 1 and "another process is writing" in err
    assert call(capsys, with_experts, "export", "pn", "--bundle", str(tmp_path / "bundle"))[0] == 0

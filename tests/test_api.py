"""The Python API: the example of docs/python.md, and what importing costs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_slm
from mlx_slm import Project
from mlx_slm.errors import SlmError

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    short = '"data.limit=150k", "clusters.k=8", "training.warmup_steps=5", "finetuning.max_steps=20"'
    assert example.count("training.tokens=300k") == 1
    example = example.replace('"training.tokens=300k",', f'"training.tokens=30k", {short}').replace("20_000", "5_000")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(PAGE), "exec"), {})
    out = capsys.readouterr().out
    found = dict(re.findall(r"^(\S+) +perplexity ([\d.]+)$", out, re.MULTILINE))
    assert set(found) == {"rich-slm-5k", "rich-is-5k"} and all(1 < float(value) < 1100 for value in found.values())
    assert (tmp_path / "notes" / "models" / "rich-is-5k" / "config.json").exists()


def test_every_name_is_there_and_nothing_is_imported_before_it_is_used():
    for name in mlx_slm.__all__:
        assert getattr(mlx_slm, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        mlx_slm.pretrian  # noqa: B018
    code = "import mlx_slm, sys; print([m for m in ('mlx.core', 'numpy', 'pydantic', 'mlx_lm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_project_is_opened_as_the_commands_do(tmp_path):
    assert Project.open(tmp_path / "w").config.model.dims == 1024, "mac"
    project = Project.open(tmp_path / "w", "laptop", ("training.steps=7",))
    assert project.config.training.steps == 7 and project.config.training.hours is None
    with pytest.raises(SlmError, match="no such file, and no shipped configuration"):
        Project.open(tmp_path / "w", "lapdog")

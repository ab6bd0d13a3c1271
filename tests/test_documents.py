"""The documents: links lead somewhere, what is cited is there, and generated pages are those of the code."""

import gzip
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import publish

from mlx_slm.cli import run
from mlx_slm.text.sources import SPLITS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PATHS = re.compile(r"`((?:mlx_slm|tests|docs|configs|scripts|benchmarks|\.ci)/[\w./*-]*)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_path_leads_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for path in PATHS.findall(text):
        assert list(ROOT.glob(path)), path


def test_what_the_code_cites_is_in_the_repository():
    for path in [*ROOT.glob("mlx_slm/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        text = path.read_text()
        assert not re.search(r"\b(?:DESIGN|NOTES)\b(?!\")", text) or path == Path(__file__), path
        for cited in re.findall(r"\b(docs/[\w/-]+\.md)\b", text):
            assert (ROOT / cited).exists(), f"{path}: {cited}"


def test_the_reference_is_that_of_the_code():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    for name, page in reference.PAGES.items():
        assert (reference.FOLDER / name).read_text() == page(), f"docs/reference/{name}: run scripts/reference.py"


LONG = ("serve", "plan")
"""Commands that are run in tests of their own: one never ends, the other measures the machine for a minute."""
SMALL = {
    "prepare": ["tokenizer.vocab_size=400", "data.context_length=32", "data.valid_fraction=0.1", "data.limit=150k"],
    "pretrain": ["training.steps=3", "training.warmup_steps=1", "clusters.k=4", "clusters.encoder=lsi"],
    "specialize": [
        *("finetuning.max_steps=4", "finetuning.warmup_steps=1", "data.context_length=32"),
        *("data.valid_fraction=0.2", "data.test_fraction=0.2"),
    ],
    "evaluate": [],
    "generate": [],
}
MODEL = ["model.family=llama", "model.num_layers=1", "model.dims=32", "model.num_heads=2", "training.batch_rows=4"]


def lines_of(page: Path) -> list[list[str]]:
    """The mlx-slm commands of a page's shell blocks up to its list of commands, variables filled in."""
    found, variables = [], {}
    for block in re.findall(r"```sh\n(.*?)```", page.read_text().split("## Commands")[0], re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            words = [re.sub(r"\$(\w+)", lambda name: variables[name[1]], word) for word in words]
            if len(words) == 1 and re.fullmatch(r"\w+=\S+", words[0]):
                variables.update([words[0].split("=")])
            elif words[:1] == ["mlx-slm"]:
                found.append(words[1:])
    return found


@pytest.mark.parametrize(("page", "count"), [("README.md", 12), ("docs/tutorial.md", 7)])
def test_every_command_of_the_page_runs(page, count, tmp_path, monkeypatch, texts, capsys):
    commands = lines_of(ROOT / page)
    assert len([command for command in commands if command[0] not in LONG]) >= count - 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for number, text in enumerate(texts[:200]):
        (tmp_path / "notes" / f"{number}.md").write_text(text)
    domain = tmp_path / "corpora" / "domains" / "pubmed"
    for path, part in (
        (tmp_path / "corpora" / "generic" / "a.jsonl.gz", texts[200:900]),
        (tmp_path / "corpora" / "generic_valid.jsonl.gz", texts[900:950]),
        *((domain / f"{split}.jsonl.gz", texts[950 + 80 * i : 1030 + 80 * i]) for i, split in enumerate(SPLITS)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in part)
    publish(tmp_path / "HuggingFaceTB" / "SmolLM2-135M", texts[:200])
    for command in commands:
        if command[0] in LONG:
            continue
        small = [word for change in [*SMALL[command[0]], *MODEL] for word in ("--set", change)]
        tokens = ["2k" if word == "250k" else word.replace("250k", "2k") for word in command]
        code = run([*tokens, *(small if command[0] not in ("evaluate", "generate") else [])])
        _, err = capsys.readouterr()
        assert code == 0, f"{' '.join(command)}\n{err}"

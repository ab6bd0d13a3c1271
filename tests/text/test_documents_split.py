"""Splits by hash, and what happens where chance leaves one empty."""

import pytest
from conftest import call, small_config, write_jsonl

from mlx_slm.config.files import dump_config
from mlx_slm.config.schema import DataConfig
from mlx_slm.errors import SlmError
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.documents import Documents, _place
from mlx_slm.text.readers import Reading
from mlx_slm.text.sources import Source
from mlx_slm.text.store import Store

CONFIG = small_config(data=DataConfig(context_length=32, valid_fraction=0.02, test_fraction=0.02))


def documents_of(tmp_path, texts, *more, config=CONFIG):
    path = write_jsonl(tmp_path / f"{len(texts)}.jsonl", texts)
    return Documents([Source(str(path), None), *more], config, Reading())


def splits(documents):
    found = {}
    for digest, text, split in documents:
        found[text] = (split, _place(digest))
    return found


@pytest.fixture
def trained_on(tmp_path, texts):
    """Texts that all fall to training, by their hashes."""
    found = splits(documents_of(tmp_path, texts[:200]))
    return [text for text, (split, _) in found.items() if split == "train"][:60]


def test_a_split_that_chance_left_empty_gets_the_nearest_document(trained_on, tmp_path):
    documents = documents_of(tmp_path, trained_on)
    before = splits(documents)
    filled = documents.in_every_split()
    after = splits(filled)
    nearest = sorted(before, key=lambda text: before[text][1])
    assert [after[text][0] for text in nearest[:2]] == ["valid", "test"]
    assert {after[text][0] for text in nearest[2:]} == {"train"}
    assert filled.in_every_split() is filled, "nothing is left to do"


def test_documents_stay_where_they_are_when_the_set_grows(trained_on, tmp_path, texts):
    small, large = splits(documents_of(tmp_path, texts[:400])), splits(documents_of(tmp_path, texts[:800]))
    assert {split for split, _ in small.values()} == {"train", "valid", "test"}
    assert all(large[text] == place for text, place in small.items())


@pytest.mark.parametrize(
    ("count", "expected"), [(1, ["train"]), (2, ["train", "valid"]), (3, ["test", "train", "valid"])]
)
def test_training_keeps_a_document(trained_on, tmp_path, count, expected):
    documents = documents_of(tmp_path, trained_on[:count])
    splits(documents)
    assert sorted(split for split, _ in splits(documents.in_every_split()).values()) == expected


def test_only_what_is_wanted_is_filled(trained_on, tmp_path):
    given = Source(str(write_jsonl(tmp_path / "valid.jsonl", ["a text of its own"])), "valid")
    documents = documents_of(tmp_path, trained_on, given)
    splits(documents)
    found = [split for split, _ in splits(documents.in_every_split()).values()]
    assert found.count("valid") == 1 and found.count("test") == 1, "one was given, the other is filled"
    none = small_config(data=DataConfig(valid_fraction=0.02, test_fraction=0.0))
    documents = documents_of(tmp_path, trained_on, config=none)
    splits(documents)
    assert sorted({split for split, _ in splits(documents.in_every_split()).values()}) == ["train", "valid"]


def test_held_out_sources_alone_are_refused(tmp_path):
    given = Source(str(write_jsonl(tmp_path / "valid.jsonl", ["a text of its own"])), "valid")
    documents = Documents([given], CONFIG, Reading())
    splits(documents)
    with pytest.raises(SlmError, match="no text to train on"):
        documents.in_every_split()


def test_a_few_long_documents_give_every_split_some(trained_on, prepared, tmp_path, capsys):
    """Sixty sitting days of a parliament, of which a fiftieth may be none."""
    workspace = Workspace(tmp_path / "w")
    workspace.root.mkdir()
    workspace.config_file.write_text(dump_config(CONFIG))
    days = write_jsonl(tmp_path / "days.jsonl", [" ".join([text] * 20) for text in trained_on])
    assert call(capsys, workspace, "prepare", "generic", str(days))[0] == 0
    assert all(Store(workspace.data("generic", split)).num_documents for split in ("train", "valid", "test"))
    code, out, err = call(capsys, workspace, "prepare", "generic", str(days))
    assert code == 0 and "up to date" in out, err


@pytest.mark.parametrize("limit", [500, 3000, 6000])
def test_a_limit_leaves_no_split_empty_while_there_is_text(limit, trained_on, tmp_path):
    """What is held out does not count towards the limit, so more is read for it."""
    config = small_config(data=DataConfig(valid_fraction=0.02, test_fraction=0.02, limit=limit))
    for first in range(0, 30, 6):
        documents = documents_of(tmp_path, trained_on[first:], config=config)
        splits(documents)
        for _ in range(3):
            filled = documents.in_every_split()
            if filled is documents:
                break
            documents = filled
            found = splits(documents)
        assert {split for split, _ in found.values()} == {"train", "valid", "test"}
        assert sum(len(text.encode()) for text, (split, _) in found.items() if split == "train") >= limit


def test_near_duplicates_that_are_all_there_is_stay_and_that_is_said(texts, tmp_path, capsys):
    workspace = Workspace(tmp_path / "w")
    workspace.root.mkdir()
    workspace.config_file.write_text(dump_config(CONFIG))
    generic = write_jsonl(tmp_path / "generic.jsonl", texts[:300])
    assert call(capsys, workspace, "prepare", "generic", str(generic))[0] == 0
    alike = write_jsonl(tmp_path / "alike.jsonl", [f"{' '.join(texts[300:320])} {i}" for i in range(6)])
    code, out, err = call(capsys, workspace, "prepare", "alike", str(alike), "--drop-near-duplicates")
    assert code == 0 and "all there are, so they stay" in out, out + err
    assert Store(workspace.data("alike", "train")).num_documents >= 1

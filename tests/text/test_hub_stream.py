"""Streams of the Hub: read once, and gone on with where they broke off. The real library on a local data set."""

import json

import datasets
import pytest
from conftest import call, small_config

from mlx_slm.config.files import dump_config
from mlx_slm.errors import SlmError
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text import hub_stream
from mlx_slm.text.hub_stream import read_hub
from mlx_slm.text.readers import Reading, read_file
from mlx_slm.text.store import Store

RECORDS = 400


@pytest.fixture
def data(tmp_path, texts, monkeypatch):
    """Two files of 200 records, each third of another kind; parts of 10 kB."""
    monkeypatch.setattr(hub_stream, "PART_BYTES", 10_000)
    directory = tmp_path / "data"
    directory.mkdir()
    for shard in range(2):
        records = [
            {"text": f"{i} {texts[i]}", "kind": "c" if i % 3 else "d"} for i in range(200 * shard, 200 * (shard + 1))
        ]
        (directory / f"train-{shard}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


class Stream:
    """What `datasets` streams, counted, and broken off before the given record."""

    def __init__(self, monkeypatch):
        self.records, self.ends_before, real = 0, None, datasets.IterableDataset.__iter__

        def counted(dataset):
            for record in real(dataset):
                if self.records == self.ends_before:
                    raise ConnectionError("the connection was reset")
                self.records += 1
                yield record

        monkeypatch.setattr(datasets.IterableDataset, "__iter__", counted)


@pytest.mark.parametrize("condition", ["", "?kind=c"])
def test_a_stream_that_breaks_off_at_ten_places_ends_with_the_same_texts(condition, data, tmp_path, monkeypatch):
    source = f"hf:{data}{condition}"
    wanted = list(read_hub(source, Reading()))
    assert len(wanted) == (RECORDS if not condition else sum(i % 3 != 0 for i in range(RECORDS)))
    stream, reading = Stream(monkeypatch), Reading(streams=tmp_path / "streams")
    again = 0
    for place in range(37, RECORDS, 37):
        before, stream.ends_before = stream.records, place + again
        with pytest.raises(SlmError, match=r"connection was reset.*check the name and the network"):
            list(read_hub(source, reading))
        again += stream.records - before - 37
    stream.ends_before = None
    assert list(read_hub(source, reading)) == wanted
    assert stream.records < RECORDS + 11 * 60, "at the most a part is read twice"
    read = stream.records
    assert list(read_hub(source, reading)) == wanted and stream.records == read, "from the disk alone"


def test_who_has_enough_leaves_the_rest_for_the_next(data, tmp_path, monkeypatch):
    wanted = list(read_hub(f"hf:{data}", Reading()))
    stream, reading = Stream(monkeypatch), Reading(streams=tmp_path / "streams")
    first = read_hub(f"hf:{data}", reading)
    assert [next(first) for _ in range(123)] == wanted[:123]
    first.close()
    assert list(read_hub(f"hf:{data}", reading)) == wanted and stream.records == RECORDS, "each record came once"


def test_a_part_that_is_damaged_is_read_again(data, tmp_path):
    reading = Reading(streams=tmp_path / "streams")
    wanted = list(read_hub(f"hf:{data}", reading))
    parts = sorted((tmp_path / "streams").rglob("*.zst"))
    assert len(parts) > 3
    raw = bytearray(parts[2].read_bytes())
    raw[len(raw) // 2] ^= 1
    parts[2].write_bytes(bytes(raw))
    assert list(read_hub(f"hf:{data}", reading)) == wanted


def test_prepare_reads_the_hub_once_and_goes_on(data, tmp_path, capsys, monkeypatch):
    workspaces = []
    for name in ("whole", "broken"):
        workspaces.append(Workspace(tmp_path / name))
        workspaces[-1].root.mkdir()
        workspaces[-1].config_file.write_text(dump_config(small_config()))
    command = ("prepare", "generic", f"hf:{data}", "--yes")
    stream = Stream(monkeypatch)
    assert call(capsys, workspaces[0], *command)[0] == 0
    assert stream.records == RECORDS, "the tokenizer's sample and the tokens came from one pass"
    stream.records, stream.ends_before = 0, 250
    code, _, err = call(capsys, workspaces[1], *command)
    assert code == 1 and "what came is kept: the same command goes on from there" in err and err.count("\n") == 1
    stream.ends_before = None
    assert call(capsys, workspaces[1], *command)[0] == 0 and stream.records < RECORDS + 80
    one, other = (Store(w.data("generic", "train")).fingerprint for w in workspaces)
    assert one == other and not list(tmp_path.rglob(".streams"))


def test_long_documents_are_cut_as_long_files_are(tmp_path, texts):
    book = "\n\n".join(texts)[:300_000]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps({"text": book}) + "\n" + json.dumps({"text": "short"}))
    (tmp_path / "book.txt").write_text(book)
    parts = list(read_hub(f"hf:{tmp_path / 'data'}", Reading()))
    assert parts[:-1] == list(read_file(tmp_path / "book.txt", Reading())) and parts[-1] == "short"
    assert "".join(parts[:-1]) == book and len(parts) > 5


def test_who_stops_within_a_long_record_loses_nothing_of_it(tmp_path, texts):
    (tmp_path / "data").mkdir()
    books = ["\n\n".join([f"book {i}", *texts])[:200_000] for i in range(3)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps({"text": book}) + "\n" for book in books))
    reading = Reading(streams=tmp_path / "streams")
    first = read_hub(f"hf:{tmp_path / 'data'}", reading)
    next(first), next(first)
    first.close()
    assert list(read_hub(f"hf:{tmp_path / 'data'}", reading)) == list(read_hub(f"hf:{tmp_path / 'data'}", Reading()))


def test_another_field_is_another_stream(tmp_path):
    (tmp_path / "data").mkdir()
    records = [{"text": f"text {i}", "other": f"other {i}"} for i in range(20)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    first = read_hub(f"hf:{tmp_path / 'data'}", Reading(streams=tmp_path / "streams"))
    next(first)
    first.close()
    other = list(read_hub(f"hf:{tmp_path / 'data'}", Reading("other", streams=tmp_path / "streams")))
    assert other == [record["other"] for record in records]

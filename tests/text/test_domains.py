"""Every set that is known by name, from a stand-in of the Hub that drops connections and asks to wait.

The stand-in has the names, forms and fields of the real data sets; the real Hub is not reached by any test.
"""

import gzip
import io
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import call, dump_config, small_config, write_jsonl
from fake_hub import SHA, FakeHub

from mlx_slm.config.files import known_sets
from mlx_slm.errors import SlmError
from mlx_slm.hub import asks_to_wait, said_by_the_hub
from mlx_slm.storage.artifacts import load_manifest
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.hub_source import HubSource
from mlx_slm.text.store import KIND, Store

READ = """
import json, os, sys, time
time.sleep = lambda seconds: None  # of those who wait before they try again
import mlx_slm
from pathlib import Path
from mlx_slm.errors import SlmError
from mlx_slm.text.hub_stream import read_hub
from mlx_slm.text.readers import Reading
for source in json.loads(sys.argv[1]):
    reading = Reading(streams=Path(sys.argv[2]))
    try:
        found = {"texts": list(read_hub(source, reading)), "revisions": reading.revisions}
    except SlmError as error:
        found = {"error": str(error)}
    print(json.dumps(found))
"""


def parquet(texts, **columns):
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts} | columns), file, row_group_size=7)
    return file.getvalue()


def lines(texts, **fields):
    return gzip.compress("".join(json.dumps({"text": text} | fields) + "\n" for text in texts).encode())


def card(configs):
    """README.md that says which files a configuration has."""
    entries = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}\n" for name, path in configs.items()
    )
    return f"---\nconfigs:\n{entries}---\n".encode()


def repository(source, texts):
    """The files of a data set by the form that its publisher gives it; half of the texts in each of two."""
    half = len(texts) // 2
    halves = (texts[:half], texts[half:])
    if source.name.startswith("haritzpuerto/"):
        files = {f"data/train-{i:05d}-of-00002.parquet": parquet(part) for i, part in enumerate(halves)}
        return files | {f"data/{split}-00000-of-00001.parquet": parquet([split]) for split in ("validation", "test")}
    if source.name.startswith("common-pile/"):
        stem, metadata = source.name.split("/")[1].removesuffix("_filtered"), {"license": "CC BY-SA", "url": "x"}
        fields = {"id": "1", "source": stem, "added": "2024-05-13", "created": "2020", "metadata": metadata}
        return {f"{stem}-{i:04d}.json.gz": lines(part, **fields) for i, part in enumerate(halves)}
    if source.name == "allenai/c4":
        files = {f"en/c4-train.{i:05d}-of-01024.json.gz": lines(part, url="u") for i, part in enumerate(halves)}
        files["en/c4-validation.00000-of-00008.json.gz"] = lines(["validation"], url="u")
        return files | {"README.md": card({"en": "en/c4-train.*.json.gz", "de": "multilingual/c4-de.*.json.gz"})}
    folder = {"sample-10BT": "sample/10BT", "fineweb-edu-dedup": "fineweb-edu-dedup"}[source.config]
    files = {f"{folder}/train-{i:05d}.parquet": parquet(part, id=["i"] * len(part)) for i, part in enumerate(halves)}
    return files | {"README.md": card({source.config: f"{folder}/*", "default": "data/*"})}


def read(hub, sources, streams):
    """What each source gives in a process that knows only this Hub."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(streams / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", READ, json.dumps(sources), str(streams)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_known_set_is_read_from_a_hub_with_faults(texts, tmp_path):
    known = known_sets()
    paper = ["arxiv", "europarl", "freelaw", "gutenberg", "opensubtitles", "openwebtext2", "pubmed", "stackexchange"]
    assert list(known)[:9] == [*paper, "wikipedia"]
    assert {name for name, entry in known.items() if entry.opt_in} == {"opensubtitles", "openwebtext2"}
    sources = [HubSource.parse(source) for entry in known.values() for source in entry.sources]
    given = {source.text: [f"{source.name} {text}" for text in texts[:40]] for source in sources}
    with FakeHub({s.name: repository(s, given[s.text]) for s in sources}, drop_every=4, busy_every=6) as hub:
        found = read(hub, list(given), tmp_path)
        assert hub.counts["busy, done"] > 20 and hub.counts["dropped, done"] > 10
    for source, result in zip(sources, found, strict=True):
        assert result == {"texts": given[source.text], "revisions": {source.text: SHA}}, source.text


def test_revision_split_files_and_fields(texts, tmp_path):
    records = [{"text": text, "kind": "ab"[i % 2], "meta": {"set": "c&d"}} for i, text in enumerate(texts[:20])]
    rows = [json.dumps(record) + "\n" for record in records]
    files = {"data/train.jsonl": "".join(rows).encode(), "data/validation.jsonl": rows[3].encode()}
    files |= {"extra/more.jsonl": rows[5].encode(), "extra/other.jsonl": rows[6].encode(), "README.md": b"# none\n"}
    wanted = {
        "hf:me/data": texts[:20],
        f"hf:me/data@{SHA}": texts[:20],
        "hf:me/data?split=validation": [texts[3]],
        "hf:me/data?files=extra/*.jsonl": [texts[5], texts[6]],
        "hf:me/data?files=extra/more.jsonl,data/validation.jsonl&split=test": [texts[5], texts[3]],
        "hf:me/data?kind=a&meta.set=c&d": texts[0:20:2],
    }
    with FakeHub({"me/data": files, "me/gated": files}) as hub:
        hub.gated.add("me/gated")
        refused = {
            "hf:me/absent": "no such directory here and no such data set on the Hub; for a private one `hf auth login`",
            "hf:me/gated": "its owner lets in those who asked: ask on https://huggingface.co/datasets/me/gated, then",
            "hf:me/data@v9": "the Hub has no revision 'v9' of it",
            "hf:me/data:french": "BuilderConfig 'french' not found",
            "hf:me/data?split=dev": "cannot be read (Bad split: dev. Available splits: ['train', 'validation'])",
            "hf:me/data?files=none/*.json": "cannot be read (No (supported) data files found",
            "hf:me/data?tone=dry": "its records have no field 'tone'; their fields: text, kind, meta",
        }
        found = read(hub, [*wanted, *refused], tmp_path)
        assert [result["texts"] for result in found[: len(wanted)]] == list(wanted.values())
        for (source, message), result in zip(refused.items(), found[len(wanted) :], strict=True):
            assert message in result["error"], result
            assert result["error"].startswith(source) and "\n" not in result["error"]
    (gone,) = read(hub, ["hf:me/data?kind=b"], tmp_path)
    assert "the Hub was not reached" in gone["error"] and "\n" not in gone["error"]


NONE = ["hf:", "hf:@x", "hf:a/b@", "hf:a/b:", "hf:a/b?x", "hf:a/b?=v", "hf:a/b?x=", "hf:a/b?split=a&split=b"]


@pytest.mark.parametrize("text", NONE)
def test_a_source_that_is_none(text):
    with pytest.raises(SlmError, match="write it as hf:OWNER|is there twice"):
        HubSource.parse(text)


def test_a_directory_has_no_revisions(tmp_path):
    with pytest.raises(SlmError, match="is a directory, which has no revisions: leave @main out"):
        HubSource.parse(f"hf:{tmp_path}@main")
    assert HubSource.parse(f"hf:{tmp_path}").is_directory


def test_who_is_asked_to_wait():
    with (
        pytest.raises(SlmError, match=r"me/data: the Hub asks to wait \(429\): the same command later, or `hf auth"),
        said_by_the_hub("me/data", "me/data", None, "dataset"),
    ):
        raise OSError("429 Too Many Requests for url: x")
    assert not asks_to_wait(OSError("set-429 is not there")) and asks_to_wait(OSError("429 Too Many Requests for url"))


def test_what_a_source_says():
    source = HubSource.parse("hf:o/d@v1.0:en?split=test&files=a/*.gz,b.gz&meta.set=Gutenberg (PG-19)")
    assert (source.name, source.revision, source.config, source.split) == ("o/d", "v1.0", "en", "test")
    assert source.files == ("a/*.gz", "b.gz") and source.conditions == (("meta.set", "Gutenberg (PG-19)"),)


def test_a_known_set_is_prepared_by_its_name_and_its_commit_recorded(texts, tmp_path):
    """The command itself, in a process that knows only this Hub."""
    workspace = Workspace(tmp_path / "w")
    workspace.root.mkdir()
    workspace.config_file.write_text(dump_config(small_config()))
    generic = write_jsonl(tmp_path / "generic.jsonl", texts[:400])
    (source,) = (HubSource.parse(text) for text in known_sets()["caselaw"].sources)
    run = (
        "import sys, time; time.sleep = lambda seconds: None\n"
        "import mlx_slm; from mlx_slm.cli import run\n"
        f"place = ['--workspace', {str(workspace.root)!r}]\n"
        f"sys.exit(run(['prepare', 'generic', {str(generic)!r}, *place]) or run(sys.argv[1:] + place))"
    )
    with FakeHub({source.name: repository(source, texts[400:600])}, drop_every=3, busy_every=5) as hub:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", run, "prepare", "caselaw", "--limit", "20k"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "caselaw: licence: public domain; about 3.9 MB of text for a million tokens" in done.stdout
    manifest = load_manifest(workspace.data("caselaw", "train"), KIND)
    assert manifest["info"]["revisions"] == {source.text: SHA}
    assert 20_000 <= Store(workspace.data("caselaw", "train")).num_bytes < 30_000


def test_those_in_doubt_are_not_read_by_name(prepared, tmp_path, capsys):
    code, _, err = call(capsys, prepared, "prepare", "opensubtitles")
    assert code == 1 and "mlx-slm prepare opensubtitles hf:haritzpuerto/the_pile_00_OpenSubtitles" in err
    assert err.count("\n") == 1

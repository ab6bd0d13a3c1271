import errno
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import small_config, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from mlx_slm.config.files import dump_config
from mlx_slm.config.schema import DataConfig, TokenizerConfig
from mlx_slm.errors import Busy, SlmError
from mlx_slm.files import Damaged
from mlx_slm.project import Project
from mlx_slm.storage.locks import in_use
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text import prepare as p
from mlx_slm.text import shards as sh
from mlx_slm.text.store import Store, cut_windows, first_windows
from mlx_slm.text.tokenizer import TrainedTokenizer

SPLITS = ("train", "valid", "test")


@pytest.fixture
def workspace(tmp_path, prepared) -> Workspace:
    """A workspace of its own with the shared tokenizer."""
    made = Workspace(tmp_path / "w")
    shutil.copytree(prepared.tokenizer, made.tokenizer)
    return made


def decoded(store: Store, tokenizer: TrainedTokenizer) -> list[str]:
    windows = store.windows[:]
    texts = []
    for document in range(store.num_documents):
        ids = np.concatenate([store.window_tokens(i) for i in np.flatnonzero(windows["document"] == document)])
        assert ids[-1] == store.eos_id
        texts.append(tokenizer.decode(ids[:-1]))
    return texts


def test_every_document_is_stored_once_in_one_split(prepared, texts, tokenizer):
    found = [text for split in SPLITS for text in decoded(Store(prepared.data("generic", split)), tokenizer)]
    assert sorted(found) == sorted(set(texts[:900]))


def test_fresh_mends_a_set_that_is_damaged(workspace, config, texts, tmp_path):
    source, project = write_jsonl(tmp_path / "notes.jsonl", texts[900:]), Project(workspace, config)
    p.prepare(project, p.Preparation("notes", [str(source)]))
    tokens = workspace.data("notes", "train") / "tokens.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:100])
    with pytest.raises(Damaged):
        p.prepare(project, p.Preparation("notes", [str(source)]))
    assert p.prepare(project, p.Preparation("notes", [str(source)], fresh=True))
    assert tokens.read_bytes() == whole


def test_windows_tile_the_tokens(store, texts):
    windows = store.windows[:]
    assert windows["length"].max() == store.context_length == 32
    assert (np.cumsum(windows["length"]) - windows["length"] == windows["offset"]).all()
    assert windows["length"].sum() == store.num_tokens == len(store.tokens)
    assert windows["bytes"].sum() == store.num_bytes
    ends = store.tokens[:][windows["offset"] + windows["length"] - 1] == store.eos_id
    assert ends.sum() == store.num_documents


def test_cut_windows_by_hand():
    windows = cut_windows(np.array([3, 8, 4]), np.arange(15), 4)
    assert windows["offset"].tolist() == [0, 3, 7, 11]
    assert windows["length"].tolist() == [3, 4, 4, 4]
    assert windows["document"].tolist() == [0, 1, 1, 2]
    assert windows["bytes"].tolist() == [3, 18, 34, 50]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 20))
def test_windows_cover_every_token_once(lengths, context_length):
    windows = cut_windows(np.array(lengths, int), np.ones(sum(lengths), np.uint8), context_length)
    covered = [i for w in windows for i in range(w["offset"], w["offset"] + w["length"])]
    assert covered == list(range(sum(lengths)))
    assert (windows["bytes"] == windows["length"]).all() and (windows["length"] <= context_length).all()
    assert np.bincount(windows["document"], windows["length"], len(lengths)).tolist() == lengths


def test_splits_are_stable_when_the_set_grows(tmp_path, prepared, texts, tokenizer, config):
    workspace = Workspace(tmp_path / "w")
    shutil.copytree(prepared.tokenizer, workspace.tokenizer)
    grown = write_jsonl(tmp_path / "grown.jsonl", list(reversed(texts)))
    p.prepare(Project(workspace, config), p.Preparation("generic", [str(grown)]))
    for split in SPLITS:
        before = set(decoded(Store(prepared.data("generic", split)), tokenizer))
        assert before <= set(decoded(Store(workspace.data("generic", split)), tokenizer))


def test_duplicates_are_kept_where_they_are_held_out(workspace, tmp_path, config, tokenizer, report):
    train = write_jsonl(tmp_path / "train.jsonl", ["kept here", "twice", "twice", "held out"] + ["more text"] * 3)
    test = write_jsonl(tmp_path / "test.jsonl", ["held out"])
    p.prepare(Project(workspace, config, report), p.Preparation("d", [f"train={train}", f"test={test}"]))
    assert decoded(Store(workspace.data("d", "train")), tokenizer) == ["kept here", "twice", "more text"]
    assert decoded(Store(workspace.data("d", "test")), tokenizer) == ["held out"]
    assert Store(workspace.data("d", "valid")).num_windows == 0
    assert "left out 4 duplicates (white space does not count)" in report.lines


def test_nothing_is_done_twice_and_changes_are_refused(workspace, tmp_path, texts, config):
    source = write_jsonl(tmp_path / "a.jsonl", texts[:100])
    assert p.prepare(Project(workspace, config), p.Preparation("d", [str(source)]))
    assert not p.prepare(Project(workspace, config), p.Preparation("d", [str(source)]))
    write_jsonl(source, texts[:101])
    with pytest.raises(SlmError, match=r"other inputs \(changed: text\): run `mlx-slm prepare d SOURCE\.\.\. --fresh`"):
        p.prepare(Project(workspace, config), p.Preparation("d", [str(source)]))
    assert p.prepare(Project(workspace, config), p.Preparation("d", [str(source)], fresh=True))
    with pytest.raises(SlmError, match=r"other inputs \(changed: context_length, data\.valid_fraction 0\.1 -> 0\.02"):
        p.prepare(
            Project(workspace, small_config(data=DataConfig(context_length=64))), p.Preparation("d", [str(source)])
        )


def test_another_tokenizer_is_refused(workspace, tmp_path, texts, prepared):
    source = write_jsonl(tmp_path / "a.jsonl", texts[:300])
    with pytest.raises(SlmError, match=r"made with other settings \(tokenizer\.vocab_size=400\).*--fresh"):
        p.prepare(
            Project(workspace, small_config(tokenizer=TokenizerConfig(vocab_size=500))),
            p.Preparation("generic", [str(source)]),
        )
    p.prepare(
        Project(workspace, small_config(tokenizer=TokenizerConfig(vocab_size=500))),
        p.Preparation("generic", [str(source)], fresh=True),
    )
    with pytest.raises(SlmError, match=r"made by another tokenizer .*mlx-slm prepare notes --fresh"):
        Store(prepared.data("notes", "train")).require_tokenizer(TrainedTokenizer(workspace.tokenizer))


def test_a_domain_before_the_generic_set(tmp_path, texts, config):
    source = write_jsonl(tmp_path / "a.jsonl", texts[:10])
    with pytest.raises(SlmError, match="no tokenizer yet: .* mlx-slm prepare generic SOURCE"):
        p.prepare(Project(Workspace(tmp_path / "w"), config), p.Preparation("d", [str(source)]))


def test_unknown_set_names_the_known(prepared, config):
    with pytest.raises(
        SlmError,
        match=r"unknown set 'note' \(did you mean notes\?\); prepared: generic, notes; known by their sources: arxiv",
    ):
        p.sources_of("note", [], prepared, config)
    assert p.sources_of("notes", [], prepared, config)[0].endswith("notes.jsonl")


def test_text_without_documents(workspace, tmp_path, config, report):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "white.txt").write_text(" \n\n")
    for name in ("empty.txt", "white.txt"):
        with pytest.raises(SlmError, match=f"no text in .*{name}: every file is empty or only white space"):
            p.prepare(Project(workspace, config, report), p.Preparation("d", [str(tmp_path / name)]))
    (tmp_path / "full.txt").write_text("something to train on")
    p.prepare(Project(workspace, config, report), p.Preparation("d", [f"train={tmp_path / '*.txt'}"]))
    assert any("no text in" in warning and "white.txt" in warning for warning in report.warnings)


def test_invalid_utf8_is_reported(workspace, tmp_path, config, report):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n{"text": "fine"}\n')
    with pytest.raises(SlmError, match="invalid UTF-8"):
        p.prepare(Project(workspace, config, report), p.Preparation("d", [f"train={path}"], strict=True))
    p.prepare(Project(workspace, config, report), p.Preparation("d", [f"train={path}"]))
    assert report.warnings == ["replaced invalid UTF-8 in 1 documents (--strict fails instead)"]


def shards_of(workspace, monkeypatch):
    """Shards of one document each, written in this process so that they can be counted and made to fail."""
    monkeypatch.setattr(sh, "SHARD_BYTES", 1)
    written = []
    real = sh.write_shard

    class Here:
        def __init__(self, *_, **__): ...

        def submit(self, _, texts, path):
            written.append(path.name)
            future = sh.Future()
            try:
                future.set_result(real(texts, TrainedTokenizer(workspace.tokenizer), path))
            except BaseException as error:
                future.set_exception(error)
            return future

        def shutdown(self, **_): ...

    monkeypatch.setattr(sh, "ProcessPoolExecutor", Here)
    return written


def test_a_killed_run_tokenises_only_what_is_missing(
    workspace, tmp_path, texts, config, monkeypatch, report, tokenizer
):
    distinct = list(dict.fromkeys(texts))[:60]
    source = write_jsonl(tmp_path / "a.jsonl", distinct)
    expected = Workspace(tmp_path / "whole")
    shutil.copytree(workspace.tokenizer, expected.tokenizer)
    p.prepare(Project(expected, config), p.Preparation("d", [str(source)]))
    written = shards_of(workspace, monkeypatch)
    monkeypatch.setattr(p, "merge_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        p.prepare(Project(workspace, config, report), p.Preparation("d", [str(source)]))
    monkeypatch.undo()
    partial = workspace.root / "data" / "d" / ".partial"
    assert len(written) == 60 == len(list(partial.glob("*.npz")))
    for name in written[10:14]:
        (partial / name).unlink()
    again = shards_of(workspace, monkeypatch)
    p.prepare(Project(workspace, config, report), p.Preparation("d", [str(source)]))
    assert again == written[10:14] and "resuming: 56 finished shards are kept" in report.lines
    for split in SPLITS:
        assert Store(workspace.data("d", split)).fingerprint == Store(expected.data("d", split)).fingerprint
    assert not partial.exists()


def test_shards_of_other_text_are_thrown_away(workspace, tmp_path, texts, config, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", texts[:5])
    partial = workspace.root / "data" / "d" / ".partial"
    partial.mkdir(parents=True)
    (partial / "plan.json").write_text(json.dumps({"text": "other"}))
    (partial / "train-00000.npz").write_bytes(b"rubbish")
    p.prepare(Project(workspace, config), p.Preparation("d", [f"train={source}"]))
    assert Store(workspace.data("d", "train")).num_documents == 5


def test_a_full_disk_keeps_the_old_store_and_the_shards(workspace, tmp_path, texts, config, monkeypatch, report):
    source = write_jsonl(tmp_path / "a.jsonl", texts[:20])
    p.prepare(Project(workspace, config), p.Preparation("d", [f"train={source}"]))
    before = Store(workspace.data("d", "train")).fingerprint
    write_jsonl(source, texts[:30])
    written = shards_of(workspace, monkeypatch)
    real, left = sh.os.fsync, [7]

    def fsync(descriptor):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device", "shard")
        real(descriptor)

    monkeypatch.setattr(sh.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        p.prepare(Project(workspace, config, report), p.Preparation("d", [f"train={source}"], fresh=True))
    assert Store(workspace.data("d", "train")).fingerprint == before
    del written[:]
    p.prepare(Project(workspace, config, report), p.Preparation("d", [f"train={source}"], fresh=True))
    assert 0 < len(written) < 30 and Store(workspace.data("d", "train")).num_documents == len(set(texts[:30]))


def test_parallel_processes_write_the_same_store(workspace, tmp_path, texts, config, prepared, monkeypatch):
    source = write_jsonl(tmp_path / "generic.jsonl", texts[:900])
    monkeypatch.setattr(sh, "SHARD_BYTES", 60_000)
    p.prepare(Project(workspace, config), p.Preparation("generic", [str(source)]))
    for split in SPLITS:
        assert Store(workspace.data("generic", split)).fingerprint == Store(prepared.data("generic", split)).fingerprint


def test_limit_counts_training_text_only(workspace, tmp_path, texts, config):
    train, test = write_jsonl(tmp_path / "a.jsonl", texts[:400]), write_jsonl(tmp_path / "b.jsonl", texts[400:800])
    p.prepare(Project(workspace, config), p.Preparation("d", [f"train={train}", f"test={test}"], limit=5000))
    stores = [Store(workspace.data("d", split)) for split in ("train", "test")]
    assert 5000 <= stores[0].num_bytes < 10_000 and stores[1].num_documents > 300


def test_strict_refuses_what_was_prepared_with_replacements(workspace, tmp_path, config):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n{"text": "fine"}\n')
    p.prepare(Project(workspace, config), p.Preparation("d", [f"train={path}"]))
    with pytest.raises(SlmError, match="holds 1 documents .* invalid UTF-8"):
        p.prepare(Project(workspace, config), p.Preparation("d", [f"train={path}"], strict=True))


def test_limit_takes_the_first_text(workspace, tmp_path, texts):
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    p.prepare(
        Project(workspace, small_config(data=DataConfig(context_length=32, limit=5000))),
        p.Preparation("d", [f"train={source}"]),
    )
    made = Store(workspace.data("d", "train"))
    assert 5000 <= made.num_bytes < 5000 + max(len(text.encode()) for text in texts)


def test_first_windows_are_nested_seeded_and_whole_documents(store):
    small, large = first_windows(store, 500, 0), first_windows(store, 2000, 0)
    length = store.windows[:]["length"]
    assert large[: len(small)].tolist() == small.tolist()
    assert 500 <= length[small].sum() < 532 and 2000 <= length[large].sum() < 2032
    assert first_windows(store, 500, 1).tolist() != small.tolist()
    assert sorted(first_windows(store, store.num_tokens, 0)) == list(range(store.num_windows))
    document = store.windows[:]["document"][large]
    assert (np.diff(np.flatnonzero(np.diff(document))) > 0).all() and len(set(document)) == (
        np.diff(document) != 0
    ).sum() + 1
    with pytest.raises(SlmError, match=r"tokens of generic were asked for and its train split holds [\d,]+:"):
        first_windows(store, store.num_tokens + 1, 0)


def test_damaged_tokens_are_noticed_before_use(workspace, tmp_path, texts, config):
    source = write_jsonl(tmp_path / "a.jsonl", texts[:50])
    p.prepare(Project(workspace, config), p.Preparation("d", [f"train={source}"]))
    path = workspace.data("d", "train") / "tokens.bin"
    raw = bytearray(path.read_bytes())
    raw[33] ^= 4
    path.write_bytes(raw)
    with pytest.raises(Damaged, match=r"tokens\.bin is damaged"):
        Store(workspace.data("d", "train")).window_tokens(0)


def test_named_splits_are_not_mixed_with_split_documents(workspace, tmp_path, texts, config, tokenizer):
    rest = write_jsonl(tmp_path / "rest.jsonl", list(dict.fromkeys(texts))[:300])
    valid = write_jsonl(tmp_path / "valid.jsonl", ["named for validation"])
    p.prepare(Project(workspace, config), p.Preparation("d", [str(rest), f"valid={valid}"]))
    assert decoded(Store(workspace.data("d", "valid")), tokenizer) == ["named for validation"]
    counts = [Store(workspace.data("d", split)).num_documents for split in ("train", "test")]
    assert sum(counts) == 300 and 15 <= counts[1] <= 50


def in_two_terminals(workspace, *commands) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of commands that run at the same time."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "mlx_slm", command[0], "--workspace", str(workspace.root), *command[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    said = [one.communicate(timeout=200) for one in started]
    return [(one.returncode, out, err) for one, (out, err) in zip(started, said, strict=True)]


def test_two_terminals_prepare_one_workspace(tmp_path, texts, config):
    """The same set twice, and a domain meanwhile: each is made once and whole."""
    source = str(write_jsonl(tmp_path / "a.jsonl", texts))
    settings = tmp_path / "c.yaml"
    settings.write_text(dump_config(config))
    own = Workspace(tmp_path / "w")
    generic = ("prepare", "generic", source, "--config", str(settings))
    for code, _, err in in_two_terminals(own, generic, generic, generic):
        assert code == 0 and "Traceback" not in err, err
    made = Store(own.data("generic", "train"))
    assert made.num_documents + sum(Store(own.data("generic", s)).num_documents for s in ("valid", "test")) == len(
        {"".join(text.split()) for text in texts}
    )
    both = in_two_terminals(own, ("prepare", "one", source), ("prepare", "two", source))
    assert [code for code, _, _ in both] == [0, 0]
    assert Store(own.data("one", "train")).fingerprint == Store(own.data("two", "train")).fingerprint


def test_a_set_in_use_is_not_rebuilt(workspace, tmp_path, texts, config, report):
    source = write_jsonl(tmp_path / "a.jsonl", texts[:300])
    p.prepare(Project(workspace, config, report), p.Preparation("d", [str(source)]))
    before = Store(workspace.data("d", "train")).fingerprint
    write_jsonl(source, texts[300:600])
    with in_use(workspace, "d"), in_use(workspace, "d"), pytest.raises(Busy, match="in use by another process"):
        p.prepare(Project(workspace, config, report), p.Preparation("d", [str(source)], fresh=True))
    assert Store(workspace.data("d", "train")).fingerprint == before
    p.prepare(Project(workspace, config, report), p.Preparation("d", [str(source)], fresh=True))
    assert Store(workspace.data("d", "train")).fingerprint != before


@pytest.mark.parametrize("changes", [{"limit": 60_000}, {"field": "body"}, {"limit": 50_000, "field": "body"}])
def test_a_set_is_used_as_it_was_prepared(changes, tmp_path, texts, config, report):
    own = Workspace(tmp_path / "w")
    field = changes.get("field", "text")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    sets = {"generic": [str(tmp_path / "a.jsonl")]}
    config = config.model_copy(update={"data": config.data.model_copy(update={"sets": sets})})
    p.prepare(Project(own, config, report), p.Preparation("generic", sets["generic"], **changes))
    before = Store(own.data("generic", "train")).fingerprint
    p.ensure_set(Project(own, config, report), "generic")
    assert Store(own.data("generic", "train")).fingerprint == before
    assert any("is used as it was prepared, with data." in line for line in report.lines)


def test_settings_that_a_set_was_not_prepared_with_are_told(prepared, config, report):
    tokenizer = config.tokenizer.model_copy(update={"vocab_size": 500})
    other = config.model_copy(update={"data": config.data.model_copy(update={"context_length": 64})})
    for changed in (other, config.model_copy(update={"tokenizer": tokenizer})):
        p.ensure_set(Project(prepared, changed, report), "notes")
    assert [warning.split(" was prepared with ")[1] for warning in report.warnings] == [
        f"data.context_length={config.data.context_length}, which stay: a new --workspace takes others",
        f"tokenizer.vocab_size={config.tokenizer.vocab_size}, which stay: a new --workspace takes others",
    ]


@pytest.mark.parametrize("number", range(6))
def test_a_single_document_is_training_text(number, tmp_path, texts, config, report):
    """Whatever its hash says; with held-out shares of 49 % each, nearly all of them are held out."""
    own = Workspace(tmp_path / "w")
    text = "\n\n".join(texts[40 * number : 40 * number + 40])
    (tmp_path / "book.txt").write_text(text)
    shares = {"valid_fraction": 0.49, "test_fraction": 0.49}
    config = config.model_copy(update={"data": config.data.model_copy(update=shares)})
    p.prepare(Project(own, config, report), p.Preparation("generic", [str(tmp_path / "book.txt")]))
    stores = [Store(own.data("generic", split)) for split in SPLITS]
    assert [store.num_documents for store in stores] == [1, 0, 0]
    two = write_jsonl(tmp_path / "two.jsonl", texts[2 * number : 2 * number + 2])
    p.prepare(Project(own, config, report), p.Preparation("two", [str(two)]))
    assert Store(own.data("two", "train")).num_documents >= 1


SPACES = {
    "line ends": lambda t: t.replace("\n", "\r\n"),
    "a last line end": lambda t: t.rstrip() + "\n",
    "tabs": lambda t: t.replace(" ", "\t"),
    "no-break spaces": lambda t: t.replace(" ", "\u00a0"),
    "wrapped": lambda t: t.replace(" ", "\n"),
    "indented": lambda t: "  " + t.replace("\n", "\n    "),
}


@pytest.mark.parametrize("name", SPACES)
def test_texts_that_differ_in_white_space_are_one(name, workspace, tmp_path, texts, config, report, tokenizer):
    some = texts[:150]
    source = write_jsonl(tmp_path / "a.jsonl", [form for text in some for form in (text, SPACES[name](text))])
    p.prepare(Project(workspace, config, report), p.Preparation("d", [str(source)]))
    splits = {s: {"".join(t.split()) for t in decoded(Store(workspace.data("d", s)), tokenizer)} for s in SPLITS}
    assert sum(map(len, splits.values())) == len({"".join(text.split()) for text in some})
    assert not splits["train"] & (splits["valid"] | splits["test"])


def test_a_kill_before_the_configuration_is_written_is_made_good(tmp_path, texts, config, report):
    own = Workspace(tmp_path / "w")
    source = write_jsonl(tmp_path / "a.jsonl", texts[:300])
    p.prepare(Project(own, config, report), p.Preparation("generic", [str(source)]))
    written = own.config_file.read_text()
    own.config_file.unlink()
    assert p.prepare(Project(own, config, report), p.Preparation("generic", [str(source)])) is False
    assert own.config_file.read_text() == written

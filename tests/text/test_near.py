"""Near-duplicates: against every pair by brute force, and what is done about them."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from conftest import call, small_config, write_jsonl

from mlx_slm.config.files import dump_config
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.near import SIMILAR, hashes, near_duplicates
from mlx_slm.text.store import Store


def mutated(text: str, share: float, rng) -> str:
    """The same with this share of its words replaced."""
    words = text.split(" ")
    for i in rng.choice(len(words), max(1, int(share * len(words))), replace=False):
        words[i] = f"w{rng.integers(1000)}"
    return " ".join(words)


@pytest.fixture(scope="module")
def collection(texts):
    """2,000 documents: pieces of real text, of which each fifth is a changed copy of another, a little or much."""
    rng = np.random.default_rng(0)
    whole = " ".join(texts).split(" ")
    originals = [" ".join(whole[i : i + 60]) for i in rng.integers(0, len(whole) - 60, 1600)]
    copies = [mutated(originals[i], share, rng) for i, share in zip(range(400), np.linspace(0, 0.2, 400), strict=True)]
    return [*originals, *copies]


def prepared_set(directory, documents, **data):
    workspace = Workspace(directory / "w")
    workspace.root.mkdir()
    config = small_config()
    config = config.model_copy(update={"data": config.data.model_copy(update={"test_fraction": 0.1, **data})})
    workspace.config_file.write_text(dump_config(config))
    return workspace, write_jsonl(directory / "generic.jsonl", documents)


def test_those_that_every_pair_compared_gives(collection, tmp_path, capsys):
    workspace, source = prepared_set(tmp_path, collection)
    assert call(capsys, workspace, "prepare", "generic", str(source))[0] == 0
    stores = [Store(workspace.data("generic", split)) for split in ("test", "valid", "train")]
    sets = []
    for store in stores:
        windows = store.windows[:]
        for document in range(store.num_documents):
            mine = windows[windows["document"] == document]
            start = int(mine["offset"][0])
            sets.append(set(hashes(store.tokens[start : start + int(mine["length"].sum()) - 1]).tolist()))
    wanted = np.full(len(sets), -1)
    holders = defaultdict(list)  # of each shingle, the documents before that have it: every pair that shares any
    for j, later in enumerate(sets):
        shared = Counter(i for shingle in later for i in holders[shingle])
        similar = [i for i, n in shared.items() if n >= SIMILAR * (len(sets[i]) + len(later) - n)]
        wanted[j] = min(similar, default=-1)
        for shingle in later:
            holders[shingle].append(j)
    near = near_duplicates(stores)
    found = np.concatenate(near.earlier)
    assert (wanted >= 0).sum() > 50, "some are there to be found"
    missed = (wanted >= 0) & (found < 0)
    assert not ((found >= 0) & (wanted < 0)).any(), "the shingles decide: none is found that is none"
    assert missed.sum() <= 1, (
        "each pair of similarity 0.8 is missed with probability 0.0002 by bands, and of signatures"
    )
    assert near.compared == len(sets)


def test_dropping_leaves_the_held_out_text_alone(collection, tmp_path, capsys):
    workspace, source = prepared_set(tmp_path, collection)
    code, out, err = call(capsys, workspace, "prepare", "generic", str(source))
    assert code == 0 and "--drop-near-duplicates leaves them out" in out, err
    before = {split: Store(workspace.data("generic", split)) for split in ("train", "valid", "test")}
    sizes = {split: store.num_documents for split, store in before.items()}
    marked = near_duplicates([before["test"], before["valid"], before["train"]]).marked(2, [0, 1, 2])
    code, _, err = call(capsys, workspace, "prepare", "generic", str(source), "--drop-near-duplicates")
    assert code == 1 and "--fresh" in err, "a set that is there is not changed without a word"
    code, out, err = call(capsys, workspace, "prepare", "generic", str(source), "--drop-near-duplicates", "--fresh")
    assert code == 0 and "(left out)" in out, err
    after = {split: Store(workspace.data("generic", split)) for split in ("train", "valid", "test")}
    assert after["train"].num_documents == sizes["train"] - marked.sum() < sizes["train"]
    assert all(after[split].num_documents == sizes[split] for split in ("valid", "test"))
    assert not near_duplicates([after["test"], after["valid"], after["train"]]).marked(2, [0, 1, 2]).any()
    assert after["train"].windows[:]["bytes"].sum() == after["train"].num_bytes
    code, out, _ = call(capsys, workspace, "prepare", "generic", str(source), "--drop-near-duplicates")
    assert code == 0 and "up to date" in out


def test_generic_text_that_holds_a_domains_held_out_text_is_told(texts, tmp_path, capsys):
    long = [" ".join(texts[i : i + 4]) for i in range(0, 800, 4)]
    workspace, source = prepared_set(tmp_path, long)
    assert call(capsys, workspace, "prepare", "generic", str(source))[0] == 0
    rng = np.random.default_rng(1)
    test = write_jsonl(tmp_path / "test.jsonl", [mutated(text, 0.01, rng) for text in long[:30]])
    train = write_jsonl(tmp_path / "train.jsonl", texts[850:950])
    valid = write_jsonl(tmp_path / "valid.jsonl", texts[950:1000])
    code, _, err = call(capsys, workspace, "prepare", "notes", f"train={train}", f"test={test}", f"valid={valid}")
    assert code == 0 and "documents of generic resemble held-out ones of notes" in err
    told = int(err.split("warning: ")[1].split()[0])
    assert 10 <= told <= 30
    before = Store(workspace.data("generic", "train")).num_documents
    code, _, err = call(capsys, workspace, "prepare", "generic", str(source), "--fresh", "--drop-near-duplicates")
    assert code == 0 and "resemble held-out" not in err, err
    assert Store(workspace.data("generic", "train")).num_documents <= before - told


def test_documents_without_a_shingle_are_not_compared(tmp_path, capsys, texts):
    short = [f"n{i}" for i in range(50)]
    workspace, source = prepared_set(tmp_path, [*texts[:300], *short])
    assert call(capsys, workspace, "prepare", "generic", str(source))[0] == 0
    store = Store(workspace.data("generic", "train"))
    found = near_duplicates([store]).earlier[0]
    windows = store.windows[:]
    lengths = np.bincount(windows["document"], windows["length"])
    assert (found[lengths - 1 < 8] == -1).all() and (lengths - 1 < 8).sum() > 30


def test_an_interruption_leaves_no_set_that_only_says_it_was_thinned(collection, tmp_path, capsys, monkeypatch):
    from mlx_slm.text import prepare

    workspace, source = prepared_set(tmp_path, collection)
    command = ("prepare", "generic", str(source), "--drop-near-duplicates")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "compare", interrupted)
        assert call(capsys, workspace, *command)[0] == 130
    code, out, err = call(capsys, workspace, *command)
    assert code == 0 and "(left out)" in out, err
    stores = [Store(workspace.data("generic", split)) for split in ("test", "valid", "train")]
    assert not near_duplicates(stores).marked(2, [0, 1, 2]).any()


def test_a_damaged_domain_does_not_stop_the_generic_set(texts, tmp_path, capsys):
    workspace, source = prepared_set(tmp_path, texts[:300])
    notes = write_jsonl(tmp_path / "notes.jsonl", texts[300:500])
    assert call(capsys, workspace, "prepare", "generic", str(source))[0] == 0
    assert call(capsys, workspace, "prepare", "notes", str(notes))[0] == 0
    (workspace.data("notes", "test") / "manifest.json").unlink()
    code, _, err = call(capsys, workspace, "prepare", "generic", str(source), "--fresh")
    assert code == 0, err

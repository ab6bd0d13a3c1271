"""`cluster` and `pretrain --method is` on a small real set: what is kept, what goes on, what is refused."""

import contextlib
import json
import shutil
import struct

import numpy as np
import pytest
from conftest import call, write_jsonl

from mlx_slm.clustering import learn
from mlx_slm.clustering.clusters import Clusters, ensure_clusters
from mlx_slm.clustering.learn import Progress
from mlx_slm.clustering.tree import assign
from mlx_slm.config.files import dump_config
from mlx_slm.embedding import embed as embedding
from mlx_slm.embedding.embed import Embeddings
from mlx_slm.embedding.lsi import LsiEncoder
from mlx_slm.errors import SlmError
from mlx_slm.files import Damaged
from mlx_slm.project import Project
from mlx_slm.report import Report
from mlx_slm.storage.locks import alone
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.sources import SPLITS
from mlx_slm.text.store import Store


@pytest.fixture(scope="module")
def clustered(prepared, config, tmp_path_factory) -> Workspace:
    """The prepared workspace with 5 and 12 clusters. Do not write into it."""
    workspace = Workspace(tmp_path_factory.mktemp("clustered") / "w")
    shutil.copytree(prepared.root, workspace.root)
    workspace.config_file.write_text(dump_config(config))
    ensure_clusters(Project(workspace, config), [12, 5], ["notes"])
    return workspace


@pytest.fixture
def own(clustered, tmp_path) -> Workspace:
    shutil.copytree(clustered.root, tmp_path / "w")
    return Workspace(tmp_path / "w")


def with_clusters(config, **changes):
    return config.model_copy(update={"clusters": config.clusters.model_copy(update=changes)})


def embeddings_of(workspace, name, split) -> Embeddings:
    (folder,) = (workspace.root / "embeddings").iterdir()
    return Embeddings(workspace.embeddings(folder.name, name, split))


@pytest.mark.parametrize("k", [5, 12])
def test_every_window_has_its_nearest_cluster(clustered, k):
    clusters = Clusters(clustered, k)
    for name in ("generic", "notes"):
        for split in SPLITS:
            store, assigned = Store(clustered.data(name, split)), clusters.assigned(name, split)
            vectors = embeddings_of(clustered, name, split).rows(0, store.num_windows)
            exact = ((vectors[:, None].astype(np.float64) - clusters.centroids) ** 2).sum(axis=2)
            places = assigned.clusters[:]
            chosen = exact[np.arange(len(places)), places]
            assert (chosen <= exact.min(axis=1) + 1e-5).all()
            lengths = store.windows[:]["length"]
            assert assigned.tokens.tolist() == np.bincount(places, lengths, minlength=k).astype(int).tolist()
            order = assigned.order[:]
            for c in range(k):
                members = order[assigned.bounds[c] : assigned.bounds[c + 1]]
                assert members.tolist() == np.flatnonzero(places == c).tolist()
                distances = exact[members, c]
                found = exact[assigned.nearest[c], c]
                np.testing.assert_allclose(found, np.sort(distances)[:3], atol=1e-5)


def test_the_streams_of_all_clusters_hold_each_token_once(clustered):
    store = Store(clustered.data("generic", "train"))
    streams = Clusters(clustered, 12).assigned("generic", "train").streams(store)
    seen = sum(int(stream.row(i)[1].sum()) for stream in streams for i in range(stream.num_rows))
    assert seen == store.num_tokens and sum(s.num_windows for s in streams) == store.num_windows
    ids = np.concatenate([store.window_tokens(streams[3].window(i)) for i in range(streams[3].num_windows)])
    rows = np.concatenate([streams[3].row(i)[0][1:][streams[3].row(i)[1] > 0] for i in range(streams[3].num_rows)])
    assert sorted(rows) == sorted(ids)


def test_what_is_there_is_kept_and_a_new_domain_is_assigned(own, config, texts, tmp_path, capsys, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in own.root.rglob("*.u4")}
    code, _, err = call(capsys, own, "prepare", "extra", str(write_jsonl(tmp_path / "x.jsonl", texts[:200])))
    assert code == 0, err
    monkeypatch.setattr(learn, "kmeans", lambda *_: pytest.fail("clustered again"))
    ensure_clusters(Project(own, config), [5, 12], ["notes", "extra"])
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert Clusters(own, 12).assigned("extra", "train").tokens.sum() == Store(own.data("extra", "train")).num_tokens


def test_changed_settings_are_refused_until_fresh(own, config):
    other = with_clusters(config, iterations=3)
    with pytest.raises(SlmError, match=r"clusters/5 was made otherwise \(iterations 50 -> 3\).*cluster --k 5 --fresh"):
        ensure_clusters(Project(own, other), [5], [])
    made = sorted((own.root / "encoder").iterdir())
    with pytest.raises(SlmError, match=r"clusters/5 was made otherwise \(dims 8 -> 9\)"):
        ensure_clusters(Project(own, with_clusters(config, dims=9)), [5], [])
    assert sorted((own.root / "encoder").iterdir()) == made, "refused before anything was fitted"
    before = Clusters(own, 5).fingerprint
    assert ensure_clusters(Project(own, other), [5], ["notes"], fresh=True)[0].fingerprint != before
    assert Clusters(own, 5).assigned("notes", "train")


def test_a_killed_k_means_goes_on_to_the_same_centroids(own, config, report, monkeypatch):
    shutil.rmtree(own.clusters(12))
    expected, save, saves = Clusters(own, 5).centroids, Progress.save, []
    ensure_clusters(Project(own, config), [12], [])
    whole = Clusters(own, 12).centroids
    shutil.rmtree(own.clusters(12))

    def killed(self, state):
        save(self, state)
        saves.append(state)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Progress, "save", killed)
        ensure_clusters(Project(own, config), [12], [])
    ensure_clusters(Project(own, config, report), [12], [])
    assert "resuming k-means at iteration 2" in report.lines
    assert (Clusters(own, 12).centroids == whole).all() and not list(own.root.glob("clusters/.*"))
    assert len(expected) == 5


def test_a_killed_embedding_keeps_its_shards(own, config, report, monkeypatch):
    whole = embeddings_of(own, "generic", "train").rows(0, 50)
    shutil.rmtree(own.root / "embeddings")
    monkeypatch.setattr(LsiEncoder, "shard_windows", 20)
    save, written = embedding.save_shard, []

    def killed(path, **arrays):
        written.append(path.name)
        if len(written) == 4:
            raise KeyboardInterrupt
        save(path, **arrays)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embedding, "save_shard", killed)
        ensure_clusters(Project(own, config), [5], [])
    monkeypatch.setattr(embedding, "save_shard", lambda path, **a: (written.append(path.name), save(path, **a)))
    ensure_clusters(Project(own, config, report), [5], [])
    assert "resuming: 3 finished shards are kept" in report.lines
    assert len(written[4:]) == len(set(written[4:])) and written[3] == written[4], "only what was missing"
    assert (embeddings_of(own, "generic", "train").rows(0, 50) == whole).all()


def test_a_damaged_shard_is_made_again(own, config, monkeypatch):
    shutil.rmtree(own.root / "embeddings")
    monkeypatch.setattr(LsiEncoder, "shard_windows", 20)
    save, written = embedding.save_shard, []

    def cut(path, **arrays):
        save(path, **arrays)
        written.append(path)
        if len(written) == 2:
            path.write_bytes(path.read_bytes()[:100])

    monkeypatch.setattr(embedding, "save_shard", cut)
    with pytest.raises(Damaged, match=r"0000000020.npz was damaged and is removed: run the same command again"):
        ensure_clusters(Project(own, config), [5], [])
    assert ensure_clusters(Project(own, config), [5], []) and written.count(written[1]) == 2


def test_encoders_live_side_by_side_and_clusters_are_used_as_they_were_made(own, config, capsys, monkeypatch):
    code, _, err = call(capsys, own, "cluster", "--k", "4", "--set", "clusters.dims=6")
    assert code == 0 and len(list((own.root / "embeddings").iterdir())) == 2, err
    monkeypatch.setattr(LsiEncoder, "encode", lambda *_: pytest.fail("embedded again"))
    assert call(capsys, own, "cluster", "--k", "5")[0] == 0, "the first encoder's embeddings are still there"
    settings = ("--set", "clusters.encoder=static", "--domain", "notes")
    code, out, err = call(capsys, own, "pretrain", "--method", "is", "--k", "4", *settings)
    assert code == 0 and "clusters/4 is used as it was made, with the encoder lsi" in out, err


def test_one_process_clusters_at_a_time_and_the_next_waits(own, config):
    with contextlib.ExitStack() as other:
        other.enter_context(alone(own.root / ".clusters.lock", "held"))
        said = []

        class Releasing(Report):
            def line(self, text):
                said.append(text)
                if "another process is clustering" in text:
                    assert not own.clusters(6).exists()
                    other.close()

        ensure_clusters(Project(own, config, Releasing()), [6], [])
    assert any(text.endswith("waiting for it") for text in said) and own.clusters(6).exists()


def test_an_encoder_that_gives_nan_is_named(own, config, monkeypatch):
    shutil.rmtree(own.root / "embeddings")
    encode = LsiEncoder.encode

    def broken(self, texts):
        found = encode(self, texts)
        found[7] = np.nan
        return found

    monkeypatch.setattr(LsiEncoder, "encode", broken)
    with pytest.raises(SlmError, match=r"the encoder gave window 7 of .*generic/train an embedding that is not finite"):
        ensure_clusters(Project(own, config), [5], [])


def test_more_clusters_than_windows_is_refused_with_the_largest(own, config, capsys):
    count = Store(own.data("generic", "train")).num_windows
    code, _, err = call(capsys, own, "cluster", "--k", "1000000")
    assert code == 1 and f"k = 1,000,000 is more than the {count:,} windows" in err
    assert f"the largest possible is {count:,}" in err


def test_damage_is_noticed(own):
    path = own.clusters(5) / "generic" / "train" / "ends.i8"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(bytes(data))
    store = Store(own.data("generic", "train"))
    with pytest.raises(Damaged, match="ends.i8 is damaged"):
        Clusters(own, 5).assigned("generic", "train").streams(store)
    centroids = own.clusters(5) / "centroids.safetensors"
    centroids.write_bytes(centroids.read_bytes()[:-1] + struct.pack("B", 7))
    with pytest.raises(Damaged, match="centroids.safetensors is damaged"):
        Clusters(own, 5)


def test_show_lists_the_clusters_and_draws_them(own, capsys):
    code, out, err = call(capsys, own, "cluster", "--k", "5", "--show", "--json")
    assert code == 0, err
    (found,) = json.loads(out)["clusters"]
    assert found["k"] == 5 and found["encoder"] == "lsi"
    assert [row["set"] for row in found["sets"]] == ["generic", "notes"]
    assert sum(c["windows"] for c in found["clusters"]) == found["sets"][0]["windows"]
    for name in ("generic", "notes"):
        assert sum(c["shares"][name] for c in found["clusters"]) == pytest.approx(1)
    assert all(1 <= len(c["nearest"]) <= 3 for c in found["clusters"] if c["windows"])
    assert (own.results / "clusters-5.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = call(capsys, own, "cluster", "--k", "5", "--k", "12")
    assert code == 0 and "5 clusters of generic" in out and "12 clusters of generic" in out and "notes" in out


def test_importance_sampling_from_end_to_end(own, capsys):
    settings = ("--set", "clusters.k=5", "--domain-tokens", "3000")
    code, out, err = call(capsys, own, "pretrain", "--method", "is", "--domain", "notes", *settings)
    assert code == 0, err
    assert "importance sampling for notes, 3,0" in out and "KL(domain || generic)" in out
    record = json.loads((own.run("is-notes-3k") / "run.json").read_text())
    assert record["method"] == "is" and record["inputs"]["importance"]["tokens"] == 3000
    facts = json.loads((own.run("is-notes-3k") / "importance.json").read_text())
    assert sum(facts["distribution"]) == pytest.approx(1) and facts["kl_resampled"] < 1e-4
    domain = Clusters(own, 5).assigned("notes", "train")
    assert facts["distribution"] != pytest.approx((domain.tokens / domain.tokens.sum()).tolist()), "a subset counts"
    code, out, err = call(capsys, own, "specialize", "--domain", "notes", "--from", "is-notes-3k")
    assert code == 0 and "--tokens 3k, those that is-notes-3k was sampled for" in out, err
    assert own.models() == ["is-notes-3k", "notes-is-3k"]
    code, _, err = call(capsys, own, "specialize", "--domain", "notes", "--from", "is-notes-3k", "--tokens", "2k")
    assert code == 0 and "was sampled for 3k tokens of notes" in err
    code, out, _ = call(capsys, own, "pretrain", "--method", "is", "--domain", "notes", *settings)
    assert code == 0 and "run is-notes-3k is finished" in out
    code, _, err = call(capsys, own, "pretrain", "--method", "is", "--domain", "notes", *settings, "--k", "12")
    assert code == 1 and "importance.k 5 -> 12" in err


def test_weights_from_a_file_take_the_place_of_a_domain(own, tmp_path, capsys):
    weights = tmp_path / "mine.yaml"
    weights.write_text("{1: 3, 4: 1}")
    code, _, err = call(capsys, own, "pretrain", "--method", "is", "--weights", str(weights), "--k", "5")
    assert code == 0, err
    facts = json.loads((own.run("is-mine") / "importance.json").read_text())
    assert facts["distribution"] == [0, 0.75, 0, 0, 0.25] and facts["clusters_used"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "is"], "give --domain NAME or --weights FILE"),
        (["--domain", "notes"], "--domain and --weights are for the methods is and cis"),
        (["--method", "is", "--weights", __file__, "--domain", "x"], "give --domain NAME or --weights FILE"),
        (["--method", "is", "--domain-tokens", "1k", "--weights", __file__], "--domain-tokens needs --domain"),
    ],
)
def test_wrong_usage(own, capsys, arguments, message):
    code, _, err = call(capsys, own, "pretrain", *arguments)
    assert code == 2 and message in err


def test_a_domain_that_is_unknown_or_the_generic_set(own, capsys):
    code, _, err = call(capsys, own, "pretrain", "--method", "is", "--domain", "note", "--k", "5")
    assert code == 1 and "unknown set 'note' (did you mean notes?)" in err
    code, _, err = call(capsys, own, "pretrain", "--method", "is", "--domain", "generic", "--k", "5")
    assert code == 1 and "that is the generic set" in err


def test_a_domain_that_no_cluster_is_near_is_said(own, texts, tmp_path, capsys, monkeypatch):
    encode = LsiEncoder.encode
    monkeypatch.setattr(LsiEncoder, "encode", lambda self, found: -2 * encode(self, found))
    assert call(capsys, own, "prepare", "strange", str(write_jsonl(tmp_path / "s.jsonl", texts[:60])))[0] == 0
    code, out, err = call(capsys, own, "pretrain", "--method", "is", "--domain", "strange", "--k", "5")
    assert code == 0, err
    facts = json.loads((own.run("is-strange-all") / "importance.json").read_text())
    assert facts["far"] > 0.9 and "of its windows are farther from a cluster" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domain", "notes", "--domain-tokens", "900M"], "900,000,000 tokens of notes were asked for"),
        (["--weights", "{bad}"], "expected a list of 7 numbers"),
        (["--weights", "{good}", "--set", "clusters.smoothing=10"], "set it to 0 with --weights"),
        (["--domain", "wide"], "data/wide has windows of 64 tokens, the configuration asks for 32"),
    ],
)
def test_wrong_input_is_refused_before_the_long_work(own, texts, tmp_path, capsys, monkeypatch, arguments, message):
    wide = str(write_jsonl(tmp_path / "wide.jsonl", texts[:200]))
    assert call(capsys, own, "prepare", "wide", wide, "--set", "data.context_length=64")[0] == 0
    (tmp_path / "bad.yaml").write_text("[1, 2]")
    (tmp_path / "good.yaml").write_text("{1: 2}")
    named = {"{bad}": str(tmp_path / "bad.yaml"), "{good}": str(tmp_path / "good.yaml")}
    monkeypatch.setattr(LsiEncoder, "encode", lambda *_: pytest.fail("embedded first"))
    code, _, err = call(capsys, own, "pretrain", "--method", "is", "--k", "7", *(named.get(a, a) for a in arguments))
    assert code == 1 and message in err


def test_max_passes_that_cannot_be_met(own, capsys):
    settings = ("--set", "clusters.max_passes=0.01", "--k", "5")
    code, _, err = call(capsys, own, "pretrain", "--method", "is", "--domain", "notes", *settings)
    assert code == 1 and "cannot be drawn in clusters.max_passes = 0.01" in err and "biggest gap is in cluster" in err


def test_assigning_in_chunks_changes_nothing(clustered):
    clusters = Clusters(clustered, 12)
    rows = embeddings_of(clustered, "generic", "train").rows(0, 200)
    parts = list(assign(iter([rows[:3], rows[3:150], rows[150:]]), clusters.levels))
    whole = next(assign(iter([rows]), clusters.levels))
    assert (np.concatenate([p for p, _ in parts]) == whole[0]).all()


def test_cluster_prepares_what_is_missing_but_asks_how_much_of_an_endless_source(tmp_path, config, texts, capsys):
    workspace = Workspace(tmp_path / "w")
    workspace.root.mkdir()
    sets = {"generic": [str(write_jsonl(tmp_path / "g.jsonl", texts[:500]))]}
    data = config.data.model_copy(update={"sets": sets})
    workspace.config_file.write_text(dump_config(config.model_copy(update={"data": data})))
    code, out, err = call(capsys, workspace, "cluster", "--k", "4")
    assert code == 0 and "set 'generic' is not prepared yet" in out, err
    other = Workspace(tmp_path / "other")
    code, _, err = call(capsys, other, "cluster", "--config", "mac")
    assert code == 1 and "how much of it? set data.limit" in err and "mlx-slm prepare generic --limit 5G" in err

"""Clusters of a tree: nested levels, assignments that go down it, what is kept and what is refused."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import call, copy_of

from mlx_slm.clustering import learn
from mlx_slm.clustering.clusters import Clusters, as_made, ensure_clusters
from mlx_slm.clustering.kmeans import nearest
from mlx_slm.clustering.tree import descend, with_levels_above
from mlx_slm.config.files import dump_config
from mlx_slm.embedding.embed import Embeddings
from mlx_slm.errors import SlmError
from mlx_slm.files import Damaged
from mlx_slm.project import Project
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.sources import SPLITS


def with_tree(config, *branches):
    return config.model_copy(update={"clusters": config.clusters.model_copy(update={"tree": list(branches)})})


@pytest.fixture(scope="module")
def planted(prepared, config, tmp_path_factory) -> Workspace:
    """The prepared workspace with the levels 3, 6 and 24 of a tree. Do not write into it."""
    workspace = copy_of(prepared, tmp_path_factory.mktemp("planted") / "w")
    config = with_tree(config, 3, 2, 4)
    workspace.config_file.write_text(dump_config(config))
    asked = ensure_clusters(Project(workspace, config), [24, 3, 6], ["notes"])
    assert [clusters.k for clusters in asked] == [24, 3, 6]
    return workspace


def vectors(workspace, name, split) -> np.ndarray:
    (folder,) = (workspace.root / "embeddings").iterdir()
    return np.concatenate(list(Embeddings(workspace.embeddings(folder.name, name, split)).chunks()))


def test_with_levels_above():
    assert with_levels_above([8, 5], []) == [[5], [8]]
    assert with_levels_above([64, 5], [4, 4, 4]) == [[4], [5], [4, 16], [4, 16, 64]]


def test_a_way_down_is_that_of_the_nearest_branch_at_every_level():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(500, 6)).astype(np.float32)
    levels = [rng.normal(size=(k, 6)).astype(np.float32) for k in (3, 12, 24)]
    places, scores = descend(mx.array(points), levels)
    for point, place, score in zip(points.astype(np.float64), places, scores, strict=True):
        at = int(((levels[0] - point) ** 2).sum(axis=1).argmin())
        for branches, level in ((4, levels[1]), (2, levels[2])):
            own = range(at * branches, (at + 1) * branches)
            at = min(own, key=lambda c: ((level[c] - point) ** 2).sum())
        assert place == at
        assert 2 * score == pytest.approx((point**2).sum() - ((levels[2][at] - point) ** 2).sum(), abs=1e-4)
    alone = descend(mx.array(points), levels[:1])
    assert all(
        np.array_equal(ours, theirs) for ours, theirs in zip(alone, nearest(mx.array(points), levels[0]), strict=True)
    )


def test_levels_nest_and_are_those_of_their_windows(planted):
    three, six, twenty_four = (Clusters(planted, k) for k in (3, 6, 24))
    assert [len(level) for level in twenty_four.levels] == [3, 6, 24]
    assert all((ours == theirs).all() for ours, theirs in zip(twenty_four.levels, six.levels, strict=False))
    for name in ("generic", "notes"):
        for split in SPLITS:
            places = {c.k: c.assigned(name, split).clusters[:] for c in (three, six, twenty_four)}
            assert (places[24] // 4 == places[6]).all() and (places[6] // 2 == places[3]).all()
            rows = vectors(planted, name, split).astype(np.float64)
            own = twenty_four.centroids.reshape(6, 4, -1)[places[6]]
            exact = ((rows[:, None] - own) ** 2).sum(axis=2)
            assert (exact[np.arange(len(rows)), places[24] % 4] <= exact.min(axis=1) + 1e-5).all()
    # the sample is of nearly all windows here
    rows, info = vectors(planted, "generic", "train"), twenty_four.manifest["info"]
    places = twenty_four.assigned("generic", "train").clusters[:]
    distance = ((rows - twenty_four.centroids[places]) ** 2).sum(dtype=np.float64) / len(rows)
    assert 0.8 * len(rows) < info["points"] <= len(rows)
    assert info["inertia"] / info["points"] == pytest.approx(distance, rel=0.03)


def test_a_tree_costs_little_of_what_flat_clusters_have(planted, config, tmp_path):
    """Inertia of 24 clusters; 2.6 % more was measured for 1,024 of real text."""
    own = copy_of(planted, tmp_path / "w")
    tree = Clusters(own, 24).manifest["info"]
    flat = ensure_clusters(Project(own, config), [24], [], fresh=True)[0]
    assert len(flat.levels) == 1
    assert flat.manifest["info"]["inertia"] < tree["inertia"] < 1.15 * flat.manifest["info"]["inertia"]


def test_a_killed_split_goes_on(planted, config, tmp_path, monkeypatch, report):
    own = copy_of(planted, tmp_path / "w")
    whole = Clusters(own, 24).centroids
    shutil.rmtree(own.clusters(24))
    real, calls = learn.kmeans, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learn, "kmeans", killed)
        ensure_clusters(Project(own, with_tree(config, 3, 2, 4)), [24], [])
    (shard, _) = sorted(own.clusters(24).with_name(".24.partial").glob("*.npz"))
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(Damaged, match="was damaged and is removed: run the same command again"):
        ensure_clusters(Project(own, with_tree(config, 3, 2, 4)), [24], [])
    ensure_clusters(Project(own, with_tree(config, 3, 2, 4), report), [24], [])
    assert "resuming: 5 finished shards are kept" in report.lines
    assert (Clusters(own, 24).centroids == whole).all() and not list(own.root.glob("clusters/.*"))


def test_another_tree_is_told(planted, config, tmp_path):
    own = copy_of(planted, tmp_path / "w")
    with pytest.raises(SlmError, match=r"clusters/24 was made otherwise \(levels \[3, 6, 24\] -> None\)"):
        ensure_clusters(Project(own, config), [24], [])
    with pytest.raises(SlmError, match=r"clusters/6 was made otherwise \(levels \[3, 6\] -> None\)"):
        ensure_clusters(Project(own, with_tree(config, 6, 4)), [24], [])
    made = as_made(Project(own, config), 24).config.clusters
    assert made.tree == [3, 2, 4]
    assert as_made(Project(own, with_tree(config, 3, 2, 4)), 3).config.clusters.tree == []


def test_clusters_with_fewer_windows_than_branches(prepared, config, tmp_path):
    """900 leaves: where a cluster has at most three windows each is a leaf, and the rest of its leaves hold none."""
    own = copy_of(prepared, tmp_path / "w")
    (clusters,) = ensure_clusters(Project(own, with_tree(config, 3, 100, 3)), [900], ["notes"])
    assigned = clusters.assigned("generic", "train")
    held = np.bincount(assigned.clusters[:], minlength=900)
    assert held.sum() == len(assigned.clusters) and (held == 0).any()
    above = Clusters(own, 300).assigned("generic", "train").clusters[:]
    few = np.bincount(above, minlength=300)[above] <= 3
    exact = (vectors(own, "generic", "train") - clusters.centroids[assigned.clusters[:]]) ** 2
    assert few.any() and exact.sum(axis=1)[few].max() < 1e-6


def test_importance_sampling_at_any_level(planted, capsys, tmp_path):
    own = copy_of(planted, tmp_path / "w")
    for k in (6, 24):
        options = ("--method", "is", "--domain", "notes", "--k", str(k), "--name", f"is-{k}")
        code, _, err = call(capsys, own, "pretrain", "-y", *options)
        assert code == 0, err
        importance = json.loads((own.run(f"is-{k}") / "importance.json").read_text())
        assert importance["clusters"] == k


def test_trees_that_are_none(planted, capsys, tmp_path):
    for tree, said in (("[1,2]", "clusters.tree"), ("[a]", "clusters.tree"), ("7", "clusters.tree")):
        code, _, err = call(capsys, planted, "cluster", "--set", f"clusters.tree={tree}")
        assert code == 1 and said in err, err

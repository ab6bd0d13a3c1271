"""`clusters/<k>`: centroids of the generic set, and for each set and split the cluster of every window.

`order` holds the windows grouped by cluster, `ends` the tokens (with separators) up to the end of each, cumulative, so
that the stream of any cluster opens in O(1). A domain's windows are assigned to the same centroids (section 2.3).
"""

from __future__ import annotations

import contextlib
from itertools import pairwise
from pathlib import Path

import numpy as np

from mlx_slm.clustering.learn import CENTROIDS, KIND, LEVEL, Learner, learned_from
from mlx_slm.clustering.tree import assign, with_levels_above
from mlx_slm.config.schema import ClustersConfig
from mlx_slm.embedding.embed import Embeddings, embed
from mlx_slm.embedding.encoder import Choice, choose_encoder, recorded_encoder
from mlx_slm.errors import SlmError
from mlx_slm.files import Damaged, append_array, read_arrays, read_json
from mlx_slm.machine.ranks import ranks
from mlx_slm.project import Project
from mlx_slm.report import Report
from mlx_slm.storage.artifacts import MANIFEST, is_made, load_manifest, new_artifact, verify
from mlx_slm.storage.forms import CountsForm
from mlx_slm.storage.locks import alone
from mlx_slm.storage.mapped import MappedFile
from mlx_slm.storage.records import write_json
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.hub_tokenizer import open_tokenizer
from mlx_slm.text.prepare import ensure_set
from mlx_slm.text.rows import Stream, separated_ends
from mlx_slm.text.sources import SPLITS
from mlx_slm.text.store import Store

ASSIGNED = "assignments"
FILES = {"clusters.u4": "<u4", "order.u4": "<u4", "ends.i8": "<i8"}
NEAREST = 3
"""Windows nearest to each centroid that are remembered."""


class Assigned:
    """The cluster of each window of one split. `bounds` int64 [k + 1]: the windows of cluster c are
    order[bounds[c]:bounds[c + 1]]; `tokens` int64 [k]: stored tokens of each cluster."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.manifest = load_manifest(self.directory, ASSIGNED)
        files = self.manifest["files"]
        self.clusters, self.order, self.ends = (
            MappedFile(self.directory / name, dtype, files[name]) for name, dtype in FILES.items()
        )
        verify(self.directory, self.manifest, ["counts.json"])
        counts = read_json(self.directory / "counts.json", CountsForm)
        self.bounds = np.concatenate([[0], np.cumsum(counts["windows"])])
        self.tokens = np.array(counts["tokens"], np.int64)
        self.nearest: list[list[int]] = counts["nearest"]
        self.distances = np.array(counts["distances"])
        """Quantiles 0, 0.01 .. 1 of the squared distance of a window to its centroid, float64 [101]."""

    def windows(self, cluster: int) -> np.ndarray:
        """uint32 of the split."""
        return self.order[int(self.bounds[cluster]) : int(self.bounds[cluster + 1])]

    def streams(self, store: Store) -> list[Stream]:
        """The stream of each cluster."""
        return [Stream(store, self.order, self.ends, int(a), int(b)) for a, b in pairwise(self.bounds)]


class Clusters:
    """Centroids and the assignments to them."""

    def __init__(self, workspace: Workspace, k: int):
        self.k, self.directory = k, workspace.clusters(k)
        self.manifest = load_manifest(self.directory, KIND)
        verify(self.directory, self.manifest)
        self.levels = read_levels(self.directory, self.manifest)
        """Centroids fp32 [k, dims] of a tree's levels down to this one, itself the last."""

    @property
    def centroids(self) -> np.ndarray:
        return self.levels[-1]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def encoder(self) -> dict:
        """The facts of the encoder that the centroids live in the space of."""
        return {key: value for key, value in self.manifest["inputs"]["embeddings"].items() if key != "store"}

    def assigned(self, name: str, split: str) -> Assigned:
        return Assigned(self.directory / name / split)


def read_levels(directory: Path, manifest: dict) -> list[np.ndarray]:
    """fp32 [k, dims] of each level of a tree down to these clusters; raises Damaged for numbers that are none, or other
    than the manifest says."""
    info = manifest["info"]
    *above, k = info.get("levels") or [info["k"]]
    names = [f"{LEVEL}{depth}" for depth in range(len(above))]
    arrays = read_arrays(directory / CENTROIDS, dict.fromkeys([*names, "centroids"], 2))
    levels = [arrays[name] for name in [*names, "centroids"]]
    for level, count in zip(levels, [*above, k], strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            finite = np.isfinite(np.einsum("kd,kd->k", level, level)).all()
        if level.shape != (count, info["dims"]) or not finite:
            raise Damaged(f"{directory / CENTROIDS}: not the centroids that its manifest speaks of")
    return levels


def ensure_clusters(
    project: Project, counts: list[int], sets: list[str], fresh: bool = False, splits: tuple[str, ...] = SPLITS
) -> list[Clusters]:
    """Embed and cluster the generic set into each number of clusters, and assign the splits of it and of `sets`.

    Prepares the generic set if that was not done. What is there and was made from the same inputs is kept. Raises
    SlmError where centroids were made from others, unless `fresh`.
    """
    workspace, report = project.workspace, project.report
    settings, generic = project.config.clusters, project.config.data.generic
    together = ranks()
    if not together.agree(generic in workspace.sets()):
        together.in_turn(lambda: None if generic in workspace.sets() else ensure_set(project, generic))
    tokenizer = open_tokenizer(workspace.tokenizer)
    store = Store(workspace.data(generic, "train"))
    store.require_tokenizer(tokenizer)
    for k in counts:
        if k > store.num_windows:
            raise SlmError(
                f"k = {k:,} is more than the {store.num_windows:,} windows of {generic}: "
                f"the largest possible is {store.num_windows:,}; choose a smaller --k or clusters.k"
            )
    choice = choose_encoder(workspace, settings, store, tokenizer, report)
    ways = with_levels_above(counts, settings.tree)
    asked = {"text": store.fingerprint, "tokenizer": tokenizer.fingerprint, "encoder": choice.facts, "levels": ways}
    learned = learned_from({}, settings, [])["kmeans"]
    together.require_same(asked | {"k-means": learned, "list of sets": [*sets, *splits], "--fresh": fresh})
    if together.size > 1:
        read = {f"{name}/{split}": Store(workspace.require_set(name, split)) for name in sets for split in splits}
        together.require_same({f"text of {place}": store.fingerprint for place, store in read.items()})
    if not fresh:
        for levels in ways:
            _require_same(workspace, {"store": store.fingerprint, **choice.facts}, settings, levels)
    made: dict[int, Clusters] = {}
    with _alone(workspace, report):
        embeddings = embed(workspace, generic, "train", choice, report)
        for *before, k in ways:
            above = made[before[-1]] if before else None
            if above:
                _ensure_assigned(workspace, [above], choice, generic, "train", report)
            made[k] = _ensure_centroids(project, [*before, k], embeddings, above, fresh and k in counts)
        for name in dict.fromkeys([generic, *sets]):
            for split in splits:
                _ensure_assigned(workspace, [made[k] for k in counts], choice, name, split, report)
    return [made[k] for k in counts]


def assign_set(
    workspace: Workspace, clusters: Clusters, name: str, split: str, encoder: str, report: Report
) -> Assigned:
    """The assignments of one split to clusters that exist, made where they are missing; the generic set is not needed.

    `encoder`: where the encoder is to be found (`recorded_encoder`).
    """
    if not ranks().agree(_is_assigned(clusters, name, split, Store(workspace.require_set(name, split)))):
        choice = recorded_encoder(workspace, clusters.encoder, encoder)
        with _alone(workspace, report):
            _ensure_assigned(workspace, [clusters], choice, name, split, report)
    return clusters.assigned(name, split)


def _alone(workspace: Workspace, report: Report) -> contextlib.AbstractContextManager[None]:
    """Of several ranks the first has the lock."""
    if not ranks().is_first:
        return contextlib.nullcontext()
    busy = f"another process is clustering in {workspace.root}: waiting for it"
    return alone(workspace.root / ".clusters.lock", busy, waiting=lambda: report.line(busy))


def _ensure_assigned(
    workspace: Workspace, made: list[Clusters], choice: Choice, name: str, split: str, report: Report
) -> None:
    store, tokenizer = Store(workspace.require_set(name, split)), open_tokenizer(workspace.tokenizer)
    store.require_tokenizer(tokenizer)
    if ranks().agree(all(_is_assigned(clusters, name, split, store) for clusters in made)):
        return
    vectors = embed(workspace, name, split, choice, report)

    def assign_missing() -> None:
        for clusters in made:
            if not _is_assigned(clusters, name, split, store):
                _assign(clusters, name, split, store, vectors, report)

    ranks().in_turn(assign_missing)


def as_made(project: Project, k: int) -> Project:
    """The same with the encoder and the settings that clusters/<k> was made with, where that exists."""
    path, settings = project.workspace.clusters(k), project.config.clusters
    if not (path / MANIFEST).exists():
        return project
    recorded = load_manifest(path, KIND)["info"]["settings"]
    if recorded["encoder"] != settings.encoder:
        project.report.line(f"clusters/{k} is used as it was made, with the encoder {recorded['encoder']}")
    return project.having(clusters=settings.model_copy(update={"tree": []} | recorded))


def far_windows(domain: Assigned, generic: Assigned) -> float:
    """The share of a domain's windows that lie farther from their cluster than 99 % of the generic windows do: where
    it is large, no cluster of the generic set is near the domain."""
    if not len(domain.clusters):
        return 0.0
    return float((domain.distances > generic.distances[99]).mean())


def _require_same(workspace: Workspace, origin: dict, settings: ClustersConfig, levels: list[int]) -> None:
    path = workspace.clusters(k := levels[-1])
    if not (path / MANIFEST).exists():
        return
    before, now = load_manifest(path, KIND)["inputs"], learned_from(origin, settings, levels)
    if before != now:
        changed = sorted(
            f"{key} {before[part].get(key)} -> {now[part].get(key)}"
            if len(str(now[part].get(key))) < 60
            else f"{key} changed"
            for part in now
            for key in {*before[part], *now[part]}
            if before[part].get(key) != now[part].get(key)
        )
        raise SlmError(
            f"{path} was made otherwise ({', '.join(changed)}): put it back, or run `mlx-slm cluster --k {k} --fresh` "
            "to make it again"
        )


def _ensure_centroids(
    project: Project, levels: list[int], embeddings: Embeddings, above: Clusters | None, fresh: bool
) -> Clusters:
    """Those of the last of a tree's levels, where `above` is the one before it."""
    workspace, settings, k = project.workspace, project.config.clusters, levels[-1]
    path, inputs = workspace.clusters(k), learned_from(embeddings.manifest["inputs"], settings, levels)
    if fresh or not ranks().agree(is_made(path, KIND, inputs)):
        settings = settings.model_copy(update={"tree": settings.tree if above else []})
        learner = Learner(path, embeddings, settings, inputs, project.report)
        if above:
            assigned = above.assigned(project.config.data.generic, "train")
            learner.split(above.levels, k, assigned.windows)
        else:
            learner.flat(k)
    return Clusters(workspace, k)


def _assignment_inputs(clusters: Clusters, store: Store) -> dict:
    return {"centroids": clusters.fingerprint, "store": store.fingerprint}


def _is_assigned(clusters: Clusters, name: str, split: str, store: Store) -> bool:
    path = clusters.directory / name / split
    wanted = _assignment_inputs(clusters, store)
    return is_made(path, ASSIGNED, wanted)


def _assign(clusters: Clusters, name: str, split: str, store: Store, vectors: Embeddings, report: Report) -> None:
    k, done = clusters.k, 0
    counts = np.zeros(k, np.int64)
    place, distance = np.empty(len(vectors), np.uint32), np.empty(len(vectors), np.float32)
    with report.progress(f"assigning {name}/{split} to {k:,} clusters", len(vectors), " windows") as advance:
        for closest, away in assign(vectors.chunks(), clusters.levels):
            place[done : done + len(closest)], distance[done : done + len(closest)] = closest, away
            counts += np.bincount(closest, minlength=k)
            done += len(closest)
            advance(len(closest))
    order = np.argsort(place, kind="stable").astype(np.uint32)
    lengths = store.windows[:]["length"]
    windows = np.split(order, np.cumsum(counts)[:-1])
    quantiles = np.quantile(distance, np.linspace(0, 1, 101)) if len(distance) else np.zeros(101)
    inputs = _assignment_inputs(clusters, store)
    with new_artifact(clusters.directory / name / split, ASSIGNED, inputs, mapped=tuple(FILES)) as (directory, info):
        arrays = (place, order, separated_ends(store, order))
        for (file, dtype), values in zip(FILES.items(), arrays, strict=True):
            with open(directory / file, "wb") as out:
                append_array(out, np.asarray(values, dtype))
        facts_of_counts = {
            "windows": counts.tolist(),
            "tokens": [int(lengths[own].sum(dtype=np.int64)) for own in windows],
            "nearest": [own[np.argsort(distance[own], kind="stable")[:NEAREST]].tolist() for own in windows],
            "distances": quantiles.tolist(),
        }
        write_json(directory / "counts.json", facts_of_counts)
        info.update(k=k, windows=len(place))

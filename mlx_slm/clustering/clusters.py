"""`clusters/<k>`: centroids of the generic set, and for each set and split the cluster of every window.

`order` holds the windows grouped by cluster, `ends` the tokens (with separators) up to the end of each, cumulative, so
that the stream of any cluster opens in O(1). A domain's windows are assigned to the same centroids (section 2.3).
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np

from mlx_slm.clustering.kmeans import KMeansState, Lloyd, assign, kmeans
from mlx_slm.config.schema import ClustersConfig
from mlx_slm.embedding.embed import Embeddings, embed
from mlx_slm.embedding.encoder import Choice, choose_encoder, recorded_encoder
from mlx_slm.errors import SlmError
from mlx_slm.files import Damaged, append_array, read_arrays, read_json, write_arrays
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

KIND, ASSIGNED = "clusters", "assignments"
CENTROIDS = "centroids.safetensors"
FILES = {"clusters.u4": "<u4", "order.u4": "<u4", "ends.i8": "<i8"}
NEAREST = 3
"""Windows nearest to each centroid that are remembered."""
LEARNING = ("points_per_centroid", "iterations", "tolerance", "restarts", "seed")


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

    def streams(self, store: Store) -> list[Stream]:
        """The stream of each cluster."""
        return [Stream(store, self.order, self.ends, int(a), int(b)) for a, b in pairwise(self.bounds)]


class Clusters:
    """Centroids fp32 [k, dims] and the assignments to them."""

    def __init__(self, workspace: Workspace, k: int):
        self.k, self.directory = k, workspace.clusters(k)
        self.manifest = load_manifest(self.directory, KIND)
        verify(self.directory, self.manifest)
        self.centroids = read_centroids(self.directory, self.manifest)

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def encoder(self) -> dict:
        """The facts of the encoder that the centroids live in the space of."""
        return {key: value for key, value in self.manifest["inputs"]["embeddings"].items() if key != "store"}

    def assigned(self, name: str, split: str) -> Assigned:
        return Assigned(self.directory / name / split)


def read_centroids(directory: Path, manifest: dict) -> np.ndarray:
    """fp32 [k, dims]; raises Damaged for numbers that are none, or not as many as the manifest says."""
    centroids = read_arrays(directory / CENTROIDS, {"centroids": 2})["centroids"]
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(np.einsum("kd,kd->k", centroids, centroids)).all()
    if centroids.shape != (manifest["info"]["k"], manifest["info"]["dims"]) or not finite:
        raise Damaged(f"{directory / CENTROIDS}: not the centroids that its manifest speaks of")
    return centroids


def ensure_clusters(
    project: Project, counts: list[int], sets: list[str], fresh: bool = False, splits: tuple[str, ...] = SPLITS
) -> list[Clusters]:
    """Embed and cluster the generic set into each number of clusters, and assign the splits of it and of `sets`.

    Prepares the generic set if that was not done. What is there and was made from the same inputs is kept. Raises
    SlmError where centroids were made from others, unless `fresh`.
    """
    workspace, report = project.workspace, project.report
    settings, generic = project.config.clusters, project.config.data.generic
    if generic not in workspace.sets():
        ensure_set(project, generic)
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
    if not fresh:
        for k in counts:
            _require_same(workspace, k, {"store": store.fingerprint, **choice.facts}, settings)
    with _alone(workspace, report):
        embeddings = embed(workspace, generic, "train", choice, report)
        made = [_ensure_centroids(workspace, k, embeddings, settings, report, fresh) for k in counts]
        for name in dict.fromkeys([generic, *sets]):
            for split in splits:
                _ensure_assigned(workspace, made, choice, name, split, report)
    return made


def assign_set(
    workspace: Workspace, clusters: Clusters, name: str, split: str, encoder: str, report: Report
) -> Assigned:
    """The assignments of one split to clusters that exist, made where they are missing; the generic set is not needed.

    `encoder`: where the encoder is to be found (`recorded_encoder`).
    """
    if not _is_assigned(clusters, name, split, Store(workspace.require_set(name, split))):
        choice = recorded_encoder(workspace, clusters.encoder, encoder)
        with _alone(workspace, report):
            _ensure_assigned(workspace, [clusters], choice, name, split, report)
    return clusters.assigned(name, split)


def _alone(workspace: Workspace, report: Report) -> contextlib.AbstractContextManager[None]:
    busy = f"another process is clustering in {workspace.root}: waiting for it"
    return alone(workspace.root / ".clusters.lock", busy, waiting=lambda: report.line(busy))


def _ensure_assigned(
    workspace: Workspace, made: list[Clusters], choice: Choice, name: str, split: str, report: Report
) -> None:
    store, tokenizer = Store(workspace.require_set(name, split)), open_tokenizer(workspace.tokenizer)
    store.require_tokenizer(tokenizer)
    missing = [clusters for clusters in made if not _is_assigned(clusters, name, split, store)]
    if missing:
        vectors = embed(workspace, name, split, choice, report)
        for clusters in missing:
            _assign(clusters, name, split, store, vectors, report)


def as_made(project: Project, k: int) -> Project:
    """The same with the encoder and the settings that clusters/<k> was made with, where that exists."""
    path, settings = project.workspace.clusters(k), project.config.clusters
    if not (path / MANIFEST).exists():
        return project
    recorded = load_manifest(path, KIND)["info"]["settings"]
    if recorded["encoder"] != settings.encoder:
        project.report.line(f"clusters/{k} is used as it was made, with the encoder {recorded['encoder']}")
    return project.having(clusters=settings.model_copy(update=recorded))


def far_windows(domain: Assigned, generic: Assigned) -> float:
    """The share of a domain's windows that lie farther from their cluster than 99 % of the generic windows do: where
    it is large, no cluster of the generic set is near the domain."""
    if not len(domain.clusters):
        return 0.0
    return float((domain.distances > generic.distances[99]).mean())


def _inputs(origin: dict, settings: ClustersConfig) -> dict:
    return {"embeddings": origin, "kmeans": settings.model_dump(mode="json", include=set(LEARNING))}


def _require_same(workspace: Workspace, k: int, origin: dict, settings: ClustersConfig) -> None:
    path = workspace.clusters(k)
    if not (path / MANIFEST).exists():
        return
    before, now = load_manifest(path, KIND)["inputs"], _inputs(origin, settings)
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
    workspace: Workspace, k: int, embeddings: Embeddings, settings: ClustersConfig, report: Report, fresh: bool
) -> Clusters:
    path = workspace.clusters(k)
    inputs = _inputs(embeddings.manifest["inputs"], settings)
    if not fresh and is_made(path, KIND, inputs):
        return Clusters(workspace, k)
    rng = np.random.default_rng((settings.seed, k))
    points = embeddings.sample(settings.points_per_centroid * k, rng)
    saved = Progress(path.with_name(f".{k}.partial"), inputs)
    state = saved.load()
    if state.iteration or state.restart:
        report.line(f"resuming k-means at iteration {state.iteration}")
    total = settings.iterations * settings.restarts
    with report.progress(f"k-means, k = {k:,}", total, " iterations") as advance:

        def on_iteration(state: KMeansState) -> None:
            advance(1)
            saved.save(state)

        lloyd = Lloyd(settings.seed, settings.iterations, settings.tolerance, settings.restarts)
        centroids, inertia = kmeans(points, k, lloyd, state, on_iteration)
    with new_artifact(path, KIND, inputs) as (directory, info):
        write_arrays(directory / CENTROIDS, {"centroids": centroids})
        info.update(k=k, points=len(points), inertia=inertia, dims=embeddings.dims)
        info["settings"] = settings.model_dump(mode="json", include={*LEARNING, "encoder", "long_windows", "dims"})
    saved.remove()
    report.line(
        f"{k:,} clusters of {len(points):,} windows, mean squared distance {inertia / len(points):.4f}, in clusters/{k}"
    )
    return Clusters(workspace, k)


class Progress:
    """The state of a k-means run on disk, so that a killed one goes on."""

    def __init__(self, directory: Path, inputs: dict):
        self.directory, self.inputs = directory, inputs

    def load(self) -> KMeansState:
        """The last state if it is of the same inputs, else a new one."""
        if not (self.directory / MANIFEST).exists():
            return KMeansState()
        with contextlib.suppress(SlmError):
            manifest = load_manifest(self.directory, "k-means state")
            verify(self.directory, manifest)
            if manifest["inputs"] == self.inputs:
                arrays: dict = read_arrays(self.directory / "arrays.safetensors")
                return KMeansState(**arrays, **manifest["info"]["numbers"])
        return KMeansState()

    def save(self, state: KMeansState) -> None:
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
        numbers = {name: value for name, value in fields.items() if name not in arrays and value is not None}
        with new_artifact(self.directory, "k-means state", self.inputs) as (directory, info):
            write_arrays(directory / "arrays.safetensors", arrays)
            info["numbers"] = numbers

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def _assignment_inputs(clusters: Clusters, store: Store) -> dict:
    return {"centroids": clusters.fingerprint, "store": store.fingerprint}


def _is_assigned(clusters: Clusters, name: str, split: str, store: Store) -> bool:
    path = clusters.directory / name / split
    wanted = _assignment_inputs(clusters, store)
    return is_made(path, ASSIGNED, wanted)


def _assign(clusters: Clusters, name: str, split: str, store: Store, vectors: Embeddings, report: Report) -> None:
    k, places, distances = clusters.k, [], []
    with report.progress(f"assigning {name}/{split} to {k:,} clusters", len(vectors), " windows") as advance:
        for closest, distance in assign(vectors.chunks(), clusters.centroids):
            places.append(closest)
            distances.append(distance)
            advance(len(closest))
    place = np.concatenate([np.zeros(0, np.int32), *places])
    distance = np.concatenate([np.zeros(0, np.float32), *distances])
    order = np.argsort(place, kind="stable")
    counts = np.bincount(place, minlength=k)
    lengths = store.windows[:]["length"]
    by_distance = np.lexsort((distance, place))
    bounds = np.concatenate([[0], np.cumsum(counts)])
    quantiles = np.quantile(distance, np.linspace(0, 1, 101)) if len(distance) else np.zeros(101)
    inputs = _assignment_inputs(clusters, store)
    with new_artifact(clusters.directory / name / split, ASSIGNED, inputs, mapped=tuple(FILES)) as (directory, info):
        arrays = (place, order, separated_ends(store, order))
        for (file, dtype), values in zip(FILES.items(), arrays, strict=True):
            with open(directory / file, "wb") as out:
                append_array(out, values.astype(dtype))
        facts_of_counts = {
            "windows": counts.tolist(),
            "tokens": np.bincount(place, lengths, minlength=k).astype(np.int64).tolist(),
            "nearest": [by_distance[a : min(b, a + NEAREST)].tolist() for a, b in pairwise(bounds)],
            "distances": quantiles.tolist(),
        }
        write_json(directory / "counts.json", facts_of_counts)
        info.update(k=k, windows=len(place))

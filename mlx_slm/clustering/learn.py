"""Centroids of the generic set -> `clusters/<k>`: flat k-means, or each cluster of a tree's level above split."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from mlx_slm.clustering.kmeans import KMeansState, Lloyd, kmeans
from mlx_slm.config.schema import ClustersConfig
from mlx_slm.embedding.embed import Embeddings
from mlx_slm.errors import SlmError
from mlx_slm.files import read_arrays, write_arrays
from mlx_slm.machine.ranks import apart, ranks
from mlx_slm.report import Report
from mlx_slm.storage.artifacts import MANIFEST, is_made, load_manifest, new_artifact, verify
from mlx_slm.text.shards import read_or_remove, save_shard, start_shards

KIND = "clusters"
CENTROIDS = "centroids.safetensors"
LEVEL = "level_"
"""Beside its own centroids a tree's level keeps those of the levels above, by their depth, from 0."""
LEARNING = ("points_per_centroid", "iterations", "tolerance", "restarts", "seed")


def learned_from(origin: dict, settings: ClustersConfig, levels: list[int]) -> dict:
    """What centroids are made from: the embeddings, and the settings; `levels`: of the tree down to these."""
    kmeans = settings.model_dump(mode="json", include=set(LEARNING))
    return {"embeddings": origin, "kmeans": kmeans | ({"levels": levels} if len(levels) > 1 else {})}


@dataclass(frozen=True)
class Learner:
    """How clusters/<k> is learned; an interrupted run goes on."""

    path: Path
    embeddings: Embeddings
    settings: ClustersConfig
    inputs: dict
    report: Report

    @property
    def lloyd(self) -> Lloyd:
        settings = self.settings
        return Lloyd(settings.seed, settings.iterations, settings.tolerance, settings.restarts)

    def flat(self, k: int) -> None:
        """k-means of a sample of the windows."""
        settings, report = self.settings, self.report
        points = self.embeddings.sample(settings.points_per_centroid * k, np.random.default_rng((settings.seed, k)))
        saved = Progress(self.path.with_name(f".{k}.partial"), self.inputs)
        state, together = saved.load(), ranks()
        if len(set(together.of_all(f"{state.restart} {state.iteration}"))) > 1:  # their files are not shared
            state = KMeansState()
        if state.iteration or state.restart:
            report.line(f"resuming k-means at iteration {state.iteration}")
        with report.progress(f"k-means, k = {k:,}", settings.iterations * settings.restarts, " iterations") as advance:

            def on_iteration(state: KMeansState) -> None:
                advance(1)
                if together.is_first:
                    saved.save(state)

            centroids, inertia = kmeans(points, k, self.lloyd, state, on_iteration)

        def write() -> None:
            if together.is_first or not is_made(self.path, KIND, self.inputs):
                self._write({"centroids": centroids}, len(points), inertia)
            saved.remove()

        together.in_turn(write)

    def split(self, levels: list[np.ndarray], k: int, windows: Callable[[int], np.ndarray]) -> None:
        """Split each cluster of the last of `levels` into as many that they are k: k-means of a sample of `windows` of
        it, indices of the embeddings."""
        above, settings = levels[-1], self.settings
        branches = k // len(above)
        partial = self.path.with_name(f".{k}.partial")
        together = ranks()
        plan = self.inputs | {"above": sha256(above.tobytes()).hexdigest()}
        together.in_turn(lambda: start_shards(partial, plan, self.report))
        shards = [partial / f"{cluster:08d}.npz" for cluster in range(len(above))]
        with self.report.progress(f"splitting {len(above):,} clusters into {k:,}", len(above), " clusters") as advance:
            advance(sum(shard.exists() for shard in shards))

            def make(cluster: int) -> None:
                own = windows(cluster)
                rng = np.random.default_rng((settings.seed, k, cluster))
                chosen = own[np.sort(rng.permutation(len(own))[: settings.points_per_centroid * branches])]
                with apart():
                    part, distances = split_points(self.embeddings.at(chosen), above[cluster], branches, self.lloyd)
                save_shard(shards[cluster], centroids=part, sums=np.array([len(chosen), distances]))
                advance(together.size)

            together.share_out(len(shards), lambda cluster: shards[cluster].exists(), make)

        def join() -> None:
            if partial.exists():
                parts, sums = zip(*(read_or_remove(shard, "centroids", "sums") for shard in shards), strict=True)
                kept = {f"{LEVEL}{depth}": level for depth, level in enumerate(levels)}
                points, inertia = np.sum(sums, axis=0)
                self._write(kept | {"centroids": np.concatenate(parts)}, int(points), float(inertia))
                shutil.rmtree(partial)

        together.in_turn(join)

    def _write(self, arrays: dict[str, np.ndarray], points: int, inertia: float) -> None:
        """`inertia`: the sum of squared distances of so many points."""
        k, dims = arrays["centroids"].shape
        keep = {*LEARNING, "encoder", "long_windows", "dims", "tree"}
        with new_artifact(self.path, KIND, self.inputs) as (directory, info):
            write_arrays(directory / CENTROIDS, arrays)
            info.update(k=k, points=points, inertia=inertia, dims=dims, levels=[len(arrays[name]) for name in arrays])
            info["settings"] = self.settings.model_dump(mode="json", include=keep)
        self.report.line(
            f"{k:,} clusters of {points:,} windows, mean squared distance {inertia / points:.4f}, in clusters/{k}"
        )


def split_points(points: np.ndarray, centroid: np.ndarray, branches: int, lloyd: Lloyd) -> tuple[np.ndarray, float]:
    """(centroids fp32 [branches, dims], inertia) of the points of one cluster; where they are fewer than the branches
    each is one, and the cluster's own stands for the rest."""
    if len(points) > branches:
        return kmeans(points, branches, lloyd)
    return np.concatenate([points, np.tile(centroid, (branches - len(points), 1))]), 0.0


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

"""The experts of a run: of a projected network (SLM-pn) or of a hard mixture (SLM-mix), each as a plain transformer.

Experts belong to clusters: a held-out window goes through the expert of its cluster, and a domain chooses an expert by
its histogram over the clusters that the run was trained on.
"""

from __future__ import annotations

import functools

import numpy as np

from mlx_slm.clustering.clusters import Assigned, Clusters, assign_set
from mlx_slm.clustering.importance import histogram
from mlx_slm.config.schema import Config
from mlx_slm.errors import SlmError
from mlx_slm.models.projected import checked_histogram, expert, network_of
from mlx_slm.report import Report
from mlx_slm.storage.artifacts import MANIFEST
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.store import Store
from mlx_slm.training.runs import Run, open_expert

FREQUENT, PRETRAINED, FINETUNED, HISTOGRAM = SELECTS = ("frequent", "pretrained", "finetuned", "histogram")
"""How a domain's expert is chosen (section 4.3, Table 5)."""


class Experts:
    """The experts of `run`, whose clusters lie in `workspace`."""

    def __init__(self, workspace: Workspace, run: Run):
        self.run, self.is_network = run, run.is_network
        inputs = run.record["inputs"]
        self.k, self.generic = inputs["k"], np.array(inputs["generic"], np.float64)
        self.clusters = self._require_clusters(workspace, inputs["clusters"])
        self.workspace = workspace

    @property
    def trained(self) -> list[int]:
        """The experts that can be used."""
        if self.is_network:
            return np.flatnonzero(self.generic).tolist()
        return [i for i in range(self.k) if (opened := open_expert(self.run, i)) and opened.finished]

    def require_trained(self) -> list[int]:
        """`trained`, of which there must be one; raises SlmError."""
        trained = self.trained
        if not trained:
            name = self.run.name
            raise SlmError(
                f"run {name} has no trained expert yet: run `mlx-slm pretrain --method mix --name {name}`, it goes on"
            )
        return trained

    def parameters(self, which: int | np.ndarray) -> dict:
        """Parameters of a plain transformer of shape `run.shape`: expert i, or the one of a histogram (SLM-pn only).

        Raises SlmError for an expert that there is not, or that was never trained.
        """
        if isinstance(which, np.ndarray):
            if not self.is_network:
                raise SlmError(
                    f"run {self.run.name}: experts of a mixture share nothing to combine: choose one of them"
                )
            never = np.flatnonzero((checked_histogram(which, self.k) > 0) & (self.generic == 0))
            if len(never):
                raise SlmError(
                    f"run {self.run.name}: the histogram has mass on cluster {never[0]}, which has no generic text: "
                    "no expert of the network was trained for it"
                )
            return expert(self.network, which)
        if not 0 <= which < self.k:
            raise SlmError(f"run {self.run.name} has the experts 0 to {self.k - 1}, not {which}")
        if self.is_network:
            return expert(self.network, which)
        opened = open_expert(self.run, which)
        if not opened or not opened.finished:
            raise SlmError(
                f"expert {which} of run {self.run.name} is not trained: "
                f"run `mlx-slm pretrain --method mix --name {self.run.name} --experts {which}`"
            )
        return opened.weights()

    def assigned(self, config: Config, name: str, split: str, report: Report) -> Assigned:
        """The clusters of a split's windows, embedded and assigned where that was not done."""
        return assign_set(self.workspace, self.clusters, name, split, config.clusters.encoder, report)

    def histogram(self, config: Config, name: str, windows: np.ndarray, report: Report) -> np.ndarray:
        """P(c | domain) of these windows of a train split, float64 [k]: shares of tokens."""
        place = self.assigned(config, name, "train", report).clusters[:][windows]
        counts = histogram(place, Store(self.workspace.data(name, "train")).lengths(windows), self.k)
        return counts / counts.sum()

    @functools.cached_property
    def network(self) -> dict:
        """Parameters of the projected network."""
        return network_of(self.run.weights())

    def _require_clusters(self, workspace: Workspace, fingerprint: str) -> Clusters:
        if not (workspace.clusters(self.k) / MANIFEST).exists():
            raise SlmError(
                f"clusters/{self.k}, which run {self.run.name} was trained on, is not in {workspace.root}: "
                f"run `mlx-slm cluster --k {self.k}`"
            )
        clusters = Clusters(workspace, self.k)
        if clusters.fingerprint != fingerprint:
            raise SlmError(
                f"clusters/{self.k} was rebuilt since run {self.run.name} was trained, so its experts belong to "
                f"other clusters: bring the old clusters back, or train it again with --fresh"
            )
        return clusters


def has_experts(run: Run) -> bool:
    """Whether a run is a projected network or a mixture itself, not a model that was specialised from one."""
    return run.is_network or run.is_mixture

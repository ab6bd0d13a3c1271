"""What importance sampling aims at: a domain (or weights), the clusters for it, and the distribution over them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mlx_slm.clustering.clusters import Clusters, as_made, ensure_clusters, far_windows
from mlx_slm.clustering.importance import (
    Adjustment,
    Importance,
    histogram,
    importance,
    read_weights,
    require_same_clusters,
)
from mlx_slm.config.schema import Config
from mlx_slm.errors import SlmError
from mlx_slm.fields import format_size
from mlx_slm.project import Project
from mlx_slm.storage.records import fingerprint
from mlx_slm.text.prepare import STREAMED_TOKENS, ensure_set, sources_of, text_needed
from mlx_slm.text.rows import Stream
from mlx_slm.text.store import Store, first_windows


@dataclasses.dataclass(frozen=True)
class SamplingTarget:
    """What importance sampling aims at: the first `tokens` tokens of a domain (None: all), or weights from a file."""

    domain: str | None = None
    tokens: int | None = None
    weights: Path | None = None

    @property
    def label(self) -> str:
        if self.weights:
            return self.weights.stem
        return f"{self.domain}-{format_size(self.tokens) if self.tokens else 'all'}"


def check_target(project: Project, target: SamplingTarget) -> None:
    """Raise SlmError, before any long work, for a domain that cannot be had or weights that make no sense."""
    config = project.config
    if target.weights:
        read_weights(target.weights, config.clusters.k)
        if config.clusters.smoothing:
            raise SlmError("clusters.smoothing counts tokens and weights have none: set it to 0 with --weights")
        return
    domain = target.domain or ""
    if domain == config.data.generic:
        raise SlmError(f"--domain {domain}: that is the generic set; importance sampling aims at another one")
    sources_of(domain, [], project.workspace, config)


def clusters_for(project: Project, target: SamplingTarget) -> Clusters:
    """Prepare the domain where that was not done, cluster the generic set, and assign the domain."""
    config, k = project.config, project.config.clusters.k
    sets = [target.domain] if target.domain else []
    for domain in sets:
        ensure_set(project, domain, text_needed(target.tokens or STREAMED_TOKENS))
        store = Store(project.workspace.data(domain, "train"))
        first_windows(store, target.tokens, config.data.seed)
        store.require_context(config.data.context_length)
    return ensure_clusters(as_made(project, k), [k], sets, splits=("train",))[0]


def importance_of(
    project: Project, target: SamplingTarget, clusters: Clusters, streams: list[Stream], rows: int
) -> Importance:
    """The distribution that `rows` training rows are drawn from; the domain counts with its first `tokens` tokens."""
    workspace, config = project.workspace, project.config
    settings, generic = config.clusters, clusters.assigned(config.data.generic, "train")
    names: dict = {"weights": str(target.weights)} if target.weights else {"domain": target.domain}
    if target.weights:
        require_same_clusters(target.weights, clusters.fingerprint)
        counts = read_weights(target.weights, clusters.k)
    else:
        domain = target.domain or ""
        store, assigned = Store(workspace.data(domain, "train")), clusters.assigned(domain, "train")
        windows = first_windows(store, target.tokens, config.data.seed)
        counts = histogram(assigned.clusters[:][windows], store.lengths(windows), clusters.k)
        names["far"] = far_windows(assigned, generic)
    num_rows = np.array([stream.num_rows for stream in streams])
    adjustment = Adjustment(settings.smoothing, settings.generic_fraction, settings.max_passes)
    return importance(counts, generic.tokens, num_rows, rows, adjustment, names)


def inputs_of(config: Config, target: SamplingTarget, clusters: Clusters, aim: Importance) -> dict:
    """What a run by importance sampling is made from, for its record."""
    knobs = ("k", "smoothing", "generic_fraction", "max_passes")
    return {
        "domain": target.domain,
        "tokens": target.tokens,
        **{name: getattr(config.clusters, name) for name in knobs},
        "clusters": clusters.fingerprint,
        "distribution": fingerprint(aim.distribution.tolist()),
    }

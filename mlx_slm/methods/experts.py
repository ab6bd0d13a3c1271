"""What methods with an expert per cluster have in common."""

from __future__ import annotations

from mlx_slm.clustering.clusters import Clusters, as_made, ensure_clusters
from mlx_slm.methods.base import Setup


def generic_clusters(setup: Setup, k: int) -> Clusters:
    """The clusters of the generic set that experts are trained on, its held-out split assigned too."""
    return ensure_clusters(as_made(setup.project, k), [k], [], splits=("train", "valid"))[0]


def experts_inputs(setup: Setup, method: str, clusters: Clusters) -> dict:
    """Inputs of a run with an expert per cluster; `generic` is the tokens of each cluster."""
    tokens = clusters.assigned(setup.project.config.data.generic, "train").tokens.tolist()
    return setup.inputs(method) | {"k": clusters.k, "clusters": clusters.fingerprint, "generic": tokens}

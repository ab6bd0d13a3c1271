"""What the experts of a projected network learned: how alike their coefficients c_i = E_i M are, layer by layer,
against how alike their clusters are. If linear projections work, experts of like clusters have like coefficients.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlx_slm.errors import SlmError
from mlx_slm.experts.experts import Experts
from mlx_slm.figures import new_figure, save_figure
from mlx_slm.models.projected import coefficients

ALIKE = 1e-4
"""Experts whose coefficients differ by less than this part do not differ: what is left is rounding."""


def geometry(experts: Experts) -> dict:
    """Cosines [k, k] per layer and of the centroids, and for each layer how the two go together.

    `{"run", "k", "order", "centroids": [[...]], "layers": [{"layer", "cosine", "spread", "correlation", "cosines":
    [[...]]}]}`. `cosines` are of a layer's coefficients, joined over its matrices, as differences from the mean expert,
    and `centroids` those of centroids as differences from the mean centroid: what all share would hide the rest.
    `cosine` is the mean over pairs of the coefficients themselves, `spread` the norm of a difference over that of the
    mean, `correlation` Pearson's over the pairs (None for experts that are all alike). Raises SlmError for a mixture or
    less than three experts.
    """
    if not experts.is_network:
        raise SlmError(f"run {experts.run.name} is a mixture: its experts share nothing that could be compared")
    if experts.k < 3:
        raise SlmError(f"run {experts.run.name} has {experts.k} experts; it takes three to compare")
    by_layer: dict[int, list[np.ndarray]] = {}
    network = experts.network
    for name, c in coefficients(network, network["E"]).items():
        by_layer.setdefault(next(int(part) for part in name.split(".") if part.isdecimal()), []).append(
            np.array(c, np.float64)
        )
    centroids = cosines(centred(experts.clusters.centroids.astype(np.float64)))
    pairs = np.triu_indices(experts.k, 1)
    layers = []
    for layer, parts in sorted(by_layer.items()):
        vectors = np.concatenate(parts, axis=1)
        apart = cosines(centred(vectors))
        spread = float(np.linalg.norm(centred(vectors), axis=1).mean() / np.linalg.norm(vectors.mean(axis=0)))
        correlation = float(np.corrcoef(apart[pairs], centroids[pairs])[0, 1])
        layers.append(
            {
                "layer": layer,
                "cosine": float(cosines(vectors)[pairs].mean()),
                "spread": spread,
                "correlation": correlation if spread > ALIKE else None,
                "cosines": apart.tolist(),
            }
        )
    return {
        "run": experts.run.label,
        "k": experts.k,
        "order": neighbours_together(centroids).tolist(),
        "centroids": centroids.tolist(),
        "layers": layers,
    }


def centred(rows: np.ndarray) -> np.ndarray:
    """Differences from the mean row."""
    return rows - rows.mean(axis=0)


def cosines(rows: np.ndarray) -> np.ndarray:
    """Cosines between rows, [n, n]."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return unit @ unit.T


def neighbours_together(similarity: np.ndarray) -> np.ndarray:
    """An order that puts like items side by side: each time the one most like the last, from the most typical on."""
    left = set(range(len(similarity)))
    order = [int(similarity.sum(axis=1).argmax())]
    left.remove(order[0])
    while left:
        order.append(max(left, key=lambda i: similarity[order[-1], i]))
        left.remove(order[-1])
    return np.array(order)


def draw(facts: dict, results: Path) -> Path:
    """The cosine matrices of centroids and of each layer, experts in the same order; returns the PNG in `results`."""
    order = np.array(facts["order"])
    panels = [("centroids of the clusters", facts["centroids"])]
    for one in facts["layers"]:
        relation = "all alike" if one["correlation"] is None else f"r = {one['correlation']:.2f}"
        panels.append((f"layer {one['layer']}: {relation}", one["cosines"]))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(3.1 * columns + 0.8, 3.2 * rows + 0.5)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis, (title, values) in zip(axes, panels, strict=False):
        image = axis.imshow(np.array(values)[np.ix_(order, order)], vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set_title(title, fontsize=10)
        ticks = range(0, facts["k"], max(1, facts["k"] // 8))
        axis.set_xticks(ticks, order[list(ticks)])
        axis.set_yticks(ticks, order[list(ticks)])
    for axis in axes[len(panels) :]:
        axis.axis("off")
    figure.colorbar(image, ax=axes.tolist(), shrink=0.8, label="cosine of differences from the mean")
    figure.suptitle(f"{facts['run']}: how alike experts are, and their clusters")
    return save_figure(figure, results / f"experts-{facts['run']}.png")

"""What the clusters are: sizes, shares per domain, the windows nearest to each centroid, and figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlx_slm.clustering.clusters import Clusters, far_windows
from mlx_slm.clustering.importance import entropy, kl
from mlx_slm.embedding.encoder import window_texts
from mlx_slm.figures import new_figure, save_figure
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.hub_tokenizer import open_tokenizer
from mlx_slm.text.store import Store

LINE = 70


def summary(clusters: Clusters, generic: str, sets: list[str]) -> dict:
    """Per set: the share of its most frequent cluster, the entropy of its histogram (Tables 9 and 10), how far it is
    from the generic set, and the share of its windows that no cluster is near."""
    reference = clusters.assigned(generic, "train")
    base, rows = reference.tokens / max(1, reference.tokens.sum()), []
    for name in [generic, *sets]:
        assigned = clusters.assigned(name, "train")
        shares = assigned.tokens / max(1, assigned.tokens.sum())
        rows.append(
            {
                "set": name,
                "windows": len(assigned.clusters),
                "tokens": int(assigned.tokens.sum()),
                "largest": float(shares.max()),
                "entropy": entropy(shares),
                "kl_generic": kl(shares, base),
                "far": far_windows(assigned, reference),
            }
        )
    return {"k": clusters.k, "encoder": clusters.manifest["inputs"]["embeddings"]["encoder"], "sets": rows}


def add_details(facts: dict, workspace: Workspace, clusters: Clusters, generic: str, sets: list[str]) -> None:
    """Add each cluster: tokens, windows, shares per set, the lines of text nearest to its centroid."""
    tokenizer, store = open_tokenizer(workspace.tokenizer), Store(workspace.data(generic, "train"))
    reference = clusters.assigned(generic, "train")
    tokens = {name: clusters.assigned(name, "train").tokens for name in [generic, *sets]}
    shares = {name: counts / max(1, counts.sum()) for name, counts in tokens.items()}
    windows = np.diff(reference.bounds)
    facts["clusters"] = [
        {
            "cluster": c,
            "windows": int(windows[c]),
            "tokens": int(reference.tokens[c]),
            "shares": {name: float(share[c]) for name, share in shares.items()},
            "nearest": [line(text) for text in window_texts(store, tokenizer, np.array(reference.nearest[c], int))],
        }
        for c in range(clusters.k)
    ]


def line(text: str) -> str:
    """The beginning of a text in one line."""
    flat = " ".join(text.split())
    return flat if len(flat) <= LINE else flat[: LINE - 1] + "…"


def table_of(facts: dict, detailed: bool) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) for a terminal: one row per set, or per cluster with up to three sets and a line of text."""
    if not detailed:
        columns = ["set", "windows", "largest cluster", "entropy, nats", "KL(set || generic)", "far"]
        return columns, [
            [
                row["set"],
                f"{row['windows']:,}",
                f"{row['largest']:.1%}",
                f"{row['entropy']:.2f}",
                "infinite" if row["kl_generic"] is None else f"{row['kl_generic']:.2f}",
                f"{row['far']:.0%}",
            ]
            for row in facts["sets"]
        ]
    names = [row["set"] for row in facts["sets"]]
    rows = []
    for cluster in sorted(facts["clusters"], key=lambda cluster: -cluster["tokens"]):
        shares = [f"{cluster['shares'][name]:.1%}" for name in names]
        first, *others = cluster["nearest"] or [""]
        rows.append([f"{cluster['cluster']}  {first}", f"{cluster['windows']:,}", *shares])
        rows += [[f"{' ' * len(str(cluster['cluster']))}  {text}", "", *[""] * len(names)] for text in others]
    return ["cluster, nearest windows", "windows", *names], rows


def draw(facts: dict, results: Path) -> Path:
    """Draw each domain's histogram over clusters beside the generic one; returns the PNG in `results`."""
    names = [row["set"] for row in facts["sets"]]
    shares = np.array([[cluster["shares"][name] for name in names] for cluster in facts["clusters"]])
    order = np.argsort(-shares[:, 0], kind="stable")
    domains = names[1:] or names
    figure = new_figure(10, 1.2 + 1.6 * len(domains))
    axes = np.atleast_1d(figure.subplots(len(domains), 1, sharex=True))
    places = np.arange(len(order))
    for axis, name in zip(axes, domains, strict=True):
        axis.bar(places, shares[order, names.index(name)], width=1.0, color="#d95f02", label=name)
        axis.step(places, shares[order, 0], where="mid", color="#333333", linewidth=1, label=names[0])
        axis.set_ylabel("share of tokens")
        axis.set_xlim(-0.5, len(order) - 0.5)
        axis.legend(loc="upper right", framealpha=0.9, edgecolor="none")
    axes[-1].set_xlabel(f"the {facts['k']:,} clusters, the largest of {names[0]} first")
    figure.suptitle(f"Histograms over clusters ({facts['encoder']})")
    return save_figure(figure, results / f"clusters-{facts['k']}.png")

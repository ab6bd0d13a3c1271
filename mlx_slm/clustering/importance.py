"""Importance sampling (section 2.4): from histograms over clusters to the distribution that training rows come from.

    L(D_spec) = E_{x ~ generic}[w(x) loss(x)],   w(x) = P(c(x) | D_spec) / P(c(x) | D_generic)

The generic set is resampled, so that its cluster histogram becomes P(c | D_spec). Histograms count tokens: rows are
equal in tokens and the loss is per token.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from mlx_slm.errors import SlmError
from mlx_slm.files import read_yaml


def histogram(clusters: np.ndarray, lengths: np.ndarray, k: int) -> np.ndarray:
    """Tokens of each cluster, float64 [k], of windows with `clusters` int [n] and `lengths` int [n]."""
    return np.bincount(clusters, lengths, minlength=k).astype(np.float64)


def smoothed(counts: np.ndarray, generic: np.ndarray, smoothing: float) -> np.ndarray:
    """q_c = (n_c + a g_c) / (n + a): the domain's token counts n_c with `smoothing` = a tokens of the generic
    histogram g_c (sums to 1). Raises SlmError for a domain without tokens."""
    if not counts.sum():
        raise SlmError("the domain has no tokens to make a histogram of: prepare more text")
    return (counts + smoothing * generic) / (counts.sum() + smoothing)


def capped(target: np.ndarray, generic: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """The distribution nearest to `target` with no more than `limits` [k] in a cluster: what is over goes to the
    clusters below their limit, in proportion to `generic`. Needs sum(limits) >= 1."""
    distribution, full = target.copy(), np.zeros(len(target), bool)
    while True:
        over = ~full & (distribution > limits)
        if not over.any():
            return distribution
        full |= over
        distribution[full] = limits[full]
        share = np.where(full, 0.0, generic)
        free = 1.0 - distribution[full].sum() - target[~full].sum()
        distribution[~full] = target[~full] + free * share[~full] / max(share.sum(), 1e-300)


@dataclass(frozen=True)
class Importance:
    """What a run draws its rows from, and what that costs in repetition."""

    distribution: np.ndarray
    """P(c) of the rows, float64 [k], sums to 1."""
    facts: dict
    """The report, for JSON."""

    @property
    def lines(self) -> str:
        """The report as text."""
        f = self.facts
        source = f"{f['domain']}, {f['domain_tokens']:,} tokens" if f["domain"] else f["weights"]
        passes = f"max {f['passes_max']:.2f} (cluster {f['passes_max_cluster']}), mean {f['passes_mean']:.2f}"
        rows = [
            (
                "clusters",
                f"{f['clusters']:,}, of them {f['clusters_used']:,} used; exp(entropy) {f['exp_entropy']:.1f}",
            ),
            ("passes, expected", passes),
            ("effective size", f"{f['effective_tokens']:,} tokens, {f['effective_fraction']:.1%} of the generic set"),
            ("KL(domain || generic)", _nats(f["kl_generic"])),
            ("KL(domain || resampled)", _nats(f["kl_resampled"])),
        ]
        if f["far"] is not None:
            far = f"{f['far']:.0%} of its windows are farther from a cluster than 99 % of the generic windows"
            rows.append(("far from all clusters", far))
        if f["moved"]:
            rows.append(
                ("moved", f"{f['moved']:.1%} of the rows, from {f['clusters_capped']:,} clusters to the generic")
            )
        return "\n".join([f"importance sampling for {source}", *(f"  {name:<24}{value}" for name, value in rows)])


@dataclass(frozen=True)
class Adjustment:
    """How the distribution departs from the domain's histogram (section `clusters` of the configuration)."""

    smoothing: float = 0.0
    generic_fraction: float = 0.0
    max_passes: float | None = None


def importance(
    counts: np.ndarray,
    generic_tokens: np.ndarray,
    rows: np.ndarray,
    wanted_rows: int,
    adjustment: Adjustment = Adjustment(),
    names: dict | None = None,
) -> Importance:
    """The distribution over clusters for a domain.

    counts: tokens of the domain per cluster [k] (or any weights); generic_tokens and rows: tokens and training rows of
    the generic set per cluster [k]; wanted_rows: rows of the whole training; names: facts for the report. Raises
    SlmError where that many rows cannot be drawn in `max_passes`, or the generic set is empty.
    """
    smoothing, generic_fraction, max_passes = astuple(adjustment)
    generic = generic_tokens / generic_tokens.sum()
    domain = smoothed(counts, generic, 0.0)
    target = (1 - generic_fraction) * smoothed(counts, generic, smoothing) + generic_fraction * generic
    limits = np.where(rows > 0, np.inf, 0.0) if max_passes is None else max_passes * rows / wanted_rows
    room = limits.sum()
    if 1 - 1e-9 < room < 1:  # 2.28 x 175 rows are 399, but for a rounding
        limits = limits / room
    elif room < 1:
        gap = int(np.argmax(target * wanted_rows - max_passes * rows))
        raise SlmError(
            f"{wanted_rows:,} rows cannot be drawn in clusters.max_passes = {max_passes:g}: the whole generic set "
            f"gives {int(max_passes * rows.sum()):,}; the biggest gap is in cluster {gap}, which would need "
            f"{math.ceil(target[gap] * wanted_rows):,} rows and has {rows[gap]:,}: train on at most "
            f"{math.floor(100 * room)} % of the tokens, raise clusters.max_passes to "
            f"{math.ceil(100 * wanted_rows / rows.sum()) / 100:g} or more, "
            "or prepare more generic text"
        )
    distribution = capped(target, generic, limits)
    distribution = distribution / distribution.sum()
    passes = np.divide(distribution * wanted_rows, rows, out=np.zeros(len(rows)), where=rows > 0)
    used = distribution > 0
    # Rows hold unequal numbers of targets where a cluster's last row is short: what is drawn, in tokens.
    resampled = np.divide(distribution * generic_tokens, rows, out=np.zeros(len(rows)), where=rows > 0)
    effective = 1.0 / (distribution[used] ** 2 / generic[used]).sum()
    facts = {
        "domain": None,
        "domain_tokens": int(counts.sum()),
        "weights": None,
        "far": None,
        **(names or {}),
        "clusters": len(counts),
        "clusters_used": int(used.sum()),
        "clusters_capped": int((target > limits).sum()),
        "rows": int(wanted_rows),
        "passes_max": float(passes.max()),
        "passes_max_cluster": int(passes.argmax()),
        "passes_mean": float(distribution @ passes),
        "effective_tokens": int(effective * generic_tokens.sum()),
        "effective_fraction": float(effective),
        "exp_entropy": math.exp(entropy(distribution)),
        "kl_generic": kl(domain, generic),
        "kl_resampled": kl(domain, resampled / resampled.sum()),
        "moved": float(np.abs(distribution - target).sum() / 2),
        "smoothing": smoothing,
        "generic_fraction": generic_fraction,
        "max_passes": max_passes,
    }
    return Importance(distribution, facts)


def entropy(p: np.ndarray) -> float:
    """In nats."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def kl(p: np.ndarray, q: np.ndarray) -> float | None:
    """KL(p || q) in nats; None for infinity, where p has mass that q has not."""
    if (q[p > 0] == 0).any():
        return None
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def _nats(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.3f} nats"


def require_same_clusters(path: Path, fingerprint: str) -> None:
    """Raise SlmError for weights that were learnt on other clusters."""
    contents = read_yaml(path)
    learnt = contents.get("clusters") if isinstance(contents, dict) else None
    if learnt not in (None, fingerprint):
        raise SlmError(f"--weights {path}: its clusters are gone, others were made since: run `mlx-slm weigh` again")


def read_weights(path: Path, k: int) -> np.ndarray:
    """Weights of the clusters from a YAML or JSON file: a list of k numbers, a mapping from cluster to number, or what
    `mlx-slm weigh` wrote.

    They need not sum to 1. Returns float64 [k]; raises SlmError naming the file and the entry.
    """
    contents = read_yaml(path)
    if isinstance(contents, dict) and "weights" in contents:
        if contents.get("k") != k:
            raise SlmError(
                f"--weights {path}: of {contents.get('k')} clusters, not of {k}: give --k {contents.get('k')}"
            )
        contents = contents["weights"]
    pairs = list(enumerate(contents) if isinstance(contents, list) else getattr(contents, "items", list)())
    if not pairs or (isinstance(contents, list) and len(contents) != k):
        raise SlmError(f"--weights {path}: expected a list of {k} numbers, or a mapping from cluster to number")
    weights = np.zeros(k)
    for key, value in pairs:
        cluster = int(key) if str(key).isdigit() else -1
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        if not 0 <= cluster < k or not good:
            raise SlmError(
                f"--weights {path}: {key}: {value}: expected a cluster from 0 to {k - 1} and a number of 0 or more"
            )
        weights[cluster] = value
    if not weights.sum():
        raise SlmError(f"--weights {path}: all weights are 0")
    return weights

"""Weights of the clusters that a domain's text asks for, learnt from what the experts of a run predict.

    q = argmax sum_t log sum_c q_c p_c(x_t | x_<t),   p_c: the expert of cluster c

in place of the histogram of the domain over the clusters (section 2.4). The sum is concave in q; EM climbs it:

    q_c <- q_c g_c,   g_c = mean over t of  p_c(x_t) / sum_j q_j p_j(x_t)

No weights are better by more than max g_c - 1 nats a token (the sum lies below its tangents).
"""

from __future__ import annotations

import numpy as np

from mlx_slm.experts.experts import Experts
from mlx_slm.finetuning.domain import DomainSet
from mlx_slm.finetuning.selection import each_expert, sample_of
from mlx_slm.project import Project

GAP, ROUNDS = 1e-4, 10_000
"""Nats a token that the best weights can still be better by, at which EM ends; and the most rounds of it."""


def learnt_weights(project: Project, experts: Experts, domain: DomainSet) -> dict:
    """`{"k", "clusters": fingerprint, "weights": {cluster: share}, "tokens", "nll", "best_expert_nll"}` from the first
    `finetuning.select_tokens` tokens of a domain set; nats per token of the mixture, and of the best expert alone."""
    windows = sample_of(project.config, domain)
    losses = each_expert(experts, lambda scorer: scorer.token_nll(domain.store, windows), project.report)
    nll = np.stack(list(losses.values()), axis=1)
    shares, mean = likeliest_mixture(-nll)
    return {
        "k": experts.k,
        "clusters": experts.clusters.fingerprint,
        "weights": {number: float(share) for number, share in zip(losses, shares, strict=True)},
        "tokens": len(nll),
        "nll": -mean,
        "best_expert_nll": float(nll.mean(axis=0, dtype=np.float64).min()),
    }


def likeliest_mixture(log_chances: np.ndarray) -> tuple[np.ndarray, float]:
    """(the weights q of a mixture that makes tokens likeliest, their mean log-probability by it), of the
    log-probabilities float [tokens, experts] that each expert gives them."""
    top = log_chances.max(axis=1, keepdims=True)
    chances = np.exp(log_chances - top, dtype=np.float64)
    weights = np.full(chances.shape[1], 1 / chances.shape[1])
    for _ in range(ROUNDS):
        gradient = chances.T @ (1 / (chances @ weights)) / len(chances)
        if gradient.max() - 1 < GAP:
            break
        weights = weights * gradient
    weights /= weights.sum()
    return weights, float(np.log(chances @ weights).mean() + top.mean(dtype=np.float64))

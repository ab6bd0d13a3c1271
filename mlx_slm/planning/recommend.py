"""Which method to take, by Figure 1 and Eq. 1."""

from __future__ import annotations

from mlx_slm.errors import SlmError
from mlx_slm.methods.costs import Cost
from mlx_slm.methods.importance import ImportanceSampling
from mlx_slm.methods.mixture import Mixture
from mlx_slm.methods.plain import Large, Small
from mlx_slm.methods.projected import ProjectedNetwork

NAMES = {
    ImportanceSampling.name: "importance sampling",
    ProjectedNetwork.name: "a projected network",
    Mixture.name: "a hard mixture",
    Small.name: "the small model",
}


def recommend(costs: dict[str, Cost], domains: int, against: dict[str, str]) -> tuple[str, str]:
    """(method, reason) by Fig. 1 and Eq. 1, for this many domains.

    `against`: why a method cannot be taken (budget, memory), for each that cannot. Raises SlmError if none can.
    """
    sampled, network = ImportanceSampling.name, ProjectedNetwork.name
    if Large.name not in against:
        return Large.name, "the inference budget admits the large model, which is the best after fine-tuning (Fig. 1)"
    shared = next((method for method in (network, Mixture.name) if method not in against), None)
    if sampled in against and shared is None:
        if Small.name in against:
            raise SlmError(f"no method fits: {against[Small.name]}; give more, or choose a smaller model")
        return Small.name, f"{NAMES[sampled]}: {against[sampled]}; {NAMES[network]}: {against[network]}"
    if sampled in against and shared:
        return shared, f"{NAMES[sampled]}: {against[sampled]}; {NAMES[shared]} serves every domain (Fig. 1)"
    if shared is None:
        return sampled, f"{NAMES[network]}: {against[network]}; {NAMES[sampled]} needs the small model alone (Fig. 1)"
    each, once = costs[sampled].total(domains), costs[shared].total(domains)
    many = f"{domains} domains" if domains > 1 else "one domain"
    compared = f"for {many} {NAMES[sampled]} takes {each:.3g} hours in all, {NAMES[shared]} {once:.3g} (Eq. 1)"
    break_even = costs[shared].generic / (costs[sampled].specialization - costs[shared].specialization)
    return (sampled if each <= once else shared), f"{compared}; they are equal at {break_even:.1f} domains"

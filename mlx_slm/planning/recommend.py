"""Which method to take, by Figure 1 and Eq. 1."""

from __future__ import annotations

from mlx_slm.errors import SlmError
from mlx_slm.methods.costs import Cost
from mlx_slm.methods.importance import Continued, ImportanceSampling
from mlx_slm.methods.mixture import Mixture
from mlx_slm.methods.plain import Large, Small
from mlx_slm.methods.projected import ProjectedNetwork

NAMES = {
    ImportanceSampling.name: "importance sampling",
    Continued.name: "going on from one generic model with importance sampling",
    ProjectedNetwork.name: "a projected network",
    Mixture.name: "a hard mixture",
    Small.name: "the small model",
}


def recommend(costs: dict[str, Cost], domains: int, against: dict[str, str]) -> tuple[str, str]:
    """(method, reason) by Fig. 1 and Eq. 1, for this many domains.

    `against`: why a method cannot be taken (budget, memory), for each that cannot. Raises SlmError if none can.
    """
    network = ProjectedNetwork.name
    sampled = _cheapest_sampling(costs, domains, against)
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
    if sampled == Continued.name:
        alone = costs[ImportanceSampling.name].total(domains)
        compared = f"{compared}, {NAMES[ImportanceSampling.name]} from scratch {alone:.3g}"
    generic = costs[shared].generic - costs[sampled].generic
    break_even = generic / (costs[sampled].specialization - costs[shared].specialization)
    equal = f"the first two are equal at {break_even:.1f} domains"
    if break_even <= 0:
        less = min((sampled, shared), key=lambda method: costs[method].total(1))
        equal = f"{NAMES[less]} takes less for any number of domains"
    return (sampled if each <= once else shared), f"{compared}; {equal}"


def _cheapest_sampling(costs: dict[str, Cost], domains: int, against: dict[str, str]) -> str:
    """Of importance sampling from scratch and by going on, what can be done and costs less for all domains."""
    scratch, continued = ImportanceSampling.name, Continued.name
    if continued not in costs or continued in against:
        return scratch
    saved = costs[scratch].total(domains) - costs[continued].total(domains)
    return continued if scratch in against or saved > 1e-9 * costs[scratch].total(domains) else scratch

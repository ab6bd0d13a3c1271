"""What a method costs: hours from rates, FLOPs from shapes, never mixed (section 3).

C_total(N) = C_generic + N * C_specialization                                                     (Eq. 1)
"""

from __future__ import annotations

from dataclasses import dataclass

METHODS = ("slm", "nopt", "is", "mix", "pn", "d", "llm", "lora")


@dataclass(frozen=True)
class Cost:
    """Of a method, in hours of one device: `generic` before any domain is known, `specialization` per domain."""

    generic: float
    specialization: float

    def total(self, domains: int) -> float:
        """Eq. 1."""
        return self.generic + domains * self.specialization


@dataclass(frozen=True)
class Rates:
    """Hours of one device per token: of training a model, and of reading text with the large one."""

    slm: float
    pn: float
    llm: float
    lora: float
    llm_forward: float

    @classmethod
    def from_flops(cls, slm_tokens_per_second: float, flops: dict[str, float]) -> Rates:
        """All from one measured speed, that of the small model, and FLOPs per token of each."""
        per_flop = 1 / (3600 * slm_tokens_per_second * flops["slm"])
        return cls(**{name: flops[name] * per_flop for name in cls.__dataclass_fields__})


PAPER_RATES = Rates(slm=2.2e-9, pn=3.6e-9, llm=7.7e-9, lora=7.7e-9, llm_forward=2.54e-9)
"""Table 2: GPU hours (A100) per token. The paper has no rate of LoRA; it is taken as the LLM's."""
PAPER_PASSES = {1_000_000: 9.0, 8_000_000: 4.0, 64_000_000: 3.5}
"""Passes over a domain set of so many tokens that fine-tuning makes at the most (inferred from Table 8)."""
PAPER_COSTS = {
    "slm": Cost(530, 0.02),
    "is": Cost(0, 130),
    "mix": Cost(650, 0.02),
    "pn": Cost(650, 0.02),
    "d": Cost(1850, 0.7),
    "llm": Cost(650, 0.12),
}
"""Table 3's upper limits, GPU hours, at a domain set of 1M tokens."""
PAPER_PERPLEXITY = {
    "slm": (18.2, 14.8, 12.0),
    "nopt": (227.1, 45.6, 17.6),
    "mix": (17.18, 14.21, 11.73),
    "pn": (16.95, 14.29, 11.74),
    "llm": (14.4, 12.5, 10.0),
}
"""Tables 4 and 8: the average of nine domains after fine-tuning on 1M, 8M and 64M tokens."""


def finetuning_tokens(domain_tokens: int) -> float:
    """Tokens that fine-tuning on a domain set processes at the most, as in the paper."""
    size = next((size for size in sorted(PAPER_PASSES) if domain_tokens <= size), max(PAPER_PASSES))
    return PAPER_PASSES[size] * domain_tokens


def costs_of_budgets(rates: Rates, generic_hours: float, sampling_hours: float, domain_tokens: int) -> dict[str, Cost]:
    """Cost of each method, where a generic pretraining gets `generic_hours` and SLM-is `sampling_hours` per domain.

    SLM-d shares its generic hours between student and teacher; per domain the teacher is fine-tuned, and the student
    then reads every token with it.
    """
    tokens = finetuning_tokens(domain_tokens)
    small, large = tokens * rates.slm, tokens * rates.llm
    return {
        "slm": Cost(generic_hours, small),
        "nopt": Cost(0.0, small),
        "is": Cost(0.0, sampling_hours + small),
        "mix": Cost(generic_hours, small),
        "pn": Cost(generic_hours, small),
        "d": Cost(generic_hours, large + small + tokens * rates.llm_forward),
        "llm": Cost(generic_hours, large),
        "lora": Cost(generic_hours, tokens * rates.lora),
    }


def recommend(
    costs: dict[str, Cost],
    domains: int,
    large_is_allowed: bool,
    specialization_hours: float | None = None,
    network_fits: bool = True,
) -> tuple[str, str]:
    """(method, reason) by Fig. 1 and Eq. 1, for so many domains.

    `large_is_allowed`: the inference budget admits the large model; `specialization_hours`: at most so many per domain
    (None: no limit); `network_fits`: a projected network can be trained in the memory at hand.
    """
    if large_is_allowed:
        return "llm", "the inference budget admits the large model, which is the best after fine-tuning (Fig. 1)"
    many = "pn" if network_fits else "mix"
    what = "a projected network" if network_fits else "a hard mixture (a projected network does not fit the memory)"
    sampling = costs["is"].specialization
    if specialization_hours is not None and sampling > specialization_hours:
        return many, (
            f"small inference and small specialization budget (Fig. 1): importance sampling takes {sampling:.3g} hours "
            f"a domain, {specialization_hours:.3g} are given; {what} takes {costs[many].specialization:.2g}"
        )
    each, shared = costs["is"].total(domains), costs[many].total(domains)
    if each <= shared:
        return "is", (
            f"small inference and large specialization budget (Fig. 1): importance sampling takes {each:.3g} hours in "
            f"all for {domains} domains, {what} {shared:.3g} (Eq. 1)"
        )
    break_even = costs[many].generic / (sampling - costs[many].specialization)
    return many, (
        f"for {domains} domains {what} takes {shared:.3g} hours in all, importance sampling {each:.3g} (Eq. 1); they "
        f"are equal at {break_even:.1f} domains"
    )

"""What a method costs: hours from rates, FLOPs from shapes, never mixed (section 3).

C_total(N) = C_generic + N * C_specialization                                                     (Eq. 1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mlx_slm.errors import SlmError

METHODS = ("slm", "nopt", "is", "mix", "pn", "d", "llm", "lora")


@dataclass(frozen=True)
class Cost:
    """Of a method, in hours of one device or in FLOPs: `generic` before any domain is known, `specialization` per
    domain."""

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
SIZES = (1_000_000, 8_000_000, 64_000_000)
"""The paper's domain sets, tokens."""
PAPER_PASSES = {
    "slm": (9.0, 4.0, 3.5),
    "llm": (15.6, 8.1, 7.1),
    "lora": (19.5, 16.2, 21.3),
    "d": (122.0, 60.7, 57.7),
}
"""Passes over a domain set that fine-tuning makes at the most, inferred: the small model's from Table 8, the large
one's and the student's from Tables 2 and 3, LoRA's from appendix F (+25 % steps at 1M, three times at 64M)."""
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


def finetuning_tokens(
    kind: str, domain_tokens: int, limit: float = math.inf, patience: float = 0.0, again: float = 0.0
) -> float:
    """Tokens that fine-tuning (`slm`, `llm`, `lora`, or a student `d`) processes at the most, and no more than `limit`.

    Passes between the paper's sizes are interpolated by the logarithm of the size; `patience` passes follow without a
    gain, and then `again` times as many as all these (section `finetuning`).
    """
    passes = np.interp(math.log(domain_tokens), np.log(SIZES), PAPER_PASSES[kind])
    return min(limit, (float(passes) + patience) * (1 + again) * domain_tokens)


def costs_of_budgets(
    rates: Rates,
    generic_hours: float,
    sampling_hours: float,
    domain_tokens: int,
    limit: float = math.inf,
    patience: float = 0.0,
    again: float = 0.0,
) -> dict[str, Cost]:
    """Cost of each method, where a generic pretraining gets `generic_hours` and SLM-is `sampling_hours` per domain.

    SLM-d shares its generic hours between student and teacher; per domain the teacher is fine-tuned, and the student
    then reads every token with it. `limit`, `patience`, `again`: see `finetuning_tokens`.
    """
    tokens = {kind: finetuning_tokens(kind, domain_tokens, limit, patience, again) for kind in PAPER_PASSES}
    small, large = tokens["slm"] * rates.slm, tokens["llm"] * rates.llm
    return {
        "slm": Cost(generic_hours, small),
        "nopt": Cost(0.0, small),
        "is": Cost(0.0, sampling_hours + small),
        "mix": Cost(generic_hours, small),
        "pn": Cost(generic_hours, small),
        "d": Cost(generic_hours, large + tokens["d"] * (rates.slm + rates.llm_forward)),
        "llm": Cost(generic_hours, large),
        "lora": Cost(generic_hours, tokens["lora"] * rates.lora),
    }


NAMES = {"is": "importance sampling", "pn": "a projected network", "mix": "a hard mixture", "slm": "the small model"}


def recommend(costs: dict[str, Cost], domains: int, against: dict[str, str]) -> tuple[str, str]:
    """(method, reason) by Fig. 1 and Eq. 1, for so many domains.

    `against`: why a method cannot be taken (budget, memory), for each that cannot. Raises SlmError if none can.
    """
    if "llm" not in against:
        return "llm", "the inference budget admits the large model, which is the best after fine-tuning (Fig. 1)"
    shared = next((method for method in ("pn", "mix") if method not in against), None)
    if "is" in against and shared is None:
        if "slm" in against:
            raise SlmError(f"no method fits: {against['slm']}; give more, or choose a smaller model")
        return "slm", f"{NAMES['is']}: {against['is']}; {NAMES['pn']}: {against['pn']}"
    if "is" in against:
        return shared, f"{NAMES['is']}: {against['is']}; {NAMES[shared]} serves every domain (Fig. 1)"
    if shared is None:
        return "is", f"{NAMES['pn']}: {against['pn']}; {NAMES['is']} needs the small model alone (Fig. 1)"
    each, once = costs["is"].total(domains), costs[shared].total(domains)
    many = f"{domains} domains" if domains > 1 else "one domain"
    compared = f"for {many} {NAMES['is']} takes {each:.3g} hours in all, {NAMES[shared]} {once:.3g} (Eq. 1)"
    break_even = costs[shared].generic / (costs["is"].specialization - costs[shared].specialization)
    return ("is" if each <= once else shared), f"{compared}; they are equal at {break_even:.1f} domains"

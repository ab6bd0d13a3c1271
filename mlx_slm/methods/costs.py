"""What a method costs: hours from rates, FLOPs from shapes, never mixed (section 3).

C_total(N) = C_generic + N * C_specialization                                                     (Eq. 1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


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
    def from_speeds(cls, speeds: dict[str, float], flops: dict[str, float]) -> Rates:
        """From measured speeds in tokens per second (that of `slm` at the least), and by FLOPs per token what was not
        measured: what a large model does from its own speed where it is known."""
        hours = {name: 1 / (3600 * speed) for name, speed in speeds.items()}
        per_flop = hours["slm"] / flops["slm"]
        per_large = hours["llm"] / flops["llm"] if "llm" in hours else per_flop
        by_flops = {name: flops[name] * (per_large if name in OF_LARGE else per_flop) for name in flops}
        return cls(**by_flops | hours)


READING = "llm_forward"
OF_LARGE = ("llm", "lora", READING)
"""Rates of what the large model does."""


@dataclass(frozen=True)
class Spending:
    """What is spent on a method, from which its cost follows."""

    rates: Rates
    generic_hours: float
    """Of a generic pretraining."""
    sampling_hours: float
    """Of a domain's own pretraining."""
    domain_tokens: int
    limit: float = math.inf
    """Tokens that a fine-tuning processes at the most."""
    patience: float = 0.0
    """Passes that follow without a gain."""
    again: float = 0.0
    """Steps of the second try, as a multiple of all these."""

    def tokens(self, kind: str) -> float:
        """Tokens that fine-tuning (`slm`, `llm`, `lora`, or a student `d`) processes at the most.

        Passes between the paper's sizes are interpolated by the logarithm of the size.
        """
        passes = np.interp(math.log(self.domain_tokens), np.log(SIZES), PAPER_PASSES[kind])
        return min(self.limit, (float(passes) + self.patience) * (1 + self.again) * self.domain_tokens)


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

"""What a user asks for, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_slm.clustering.target import SamplingTarget

SCRATCH = "none"
"""`Specialisation.source` for training on the domain alone."""


@dataclass(frozen=True)
class Pretraining:
    """Train the model of a method on the generic set."""

    method: str = "slm"
    name: str | None = None
    """Of the run. Default: the method, or is-<domain>-<its tokens>."""
    fresh: bool = False
    """Throw an earlier run of this name away."""
    target: SamplingTarget | None = None
    """For SLM-is: what the generic set is resampled to look like."""
    init_from: Path | None = None
    """A model directory to start from, with its own tokenizer."""
    experts: list[int] | None = None
    """For SLM-mix: the experts to train now. Default: all."""


@dataclass(frozen=True)
class Specialisation:
    """Train on a domain: fine-tune a pretrained model, or train one from scratch."""

    domain: str
    source: str | None = None
    """The pretrained run, a bundle's directory, or 'none' to train on the domain alone. Default: the run of method
    slm."""
    tokens: int | None = None
    """Use the first tokens of the domain's documents in a seeded order. Default: all."""
    name: str | None = None
    """Of the run and the model. Default: <domain>-<method>[-<select>]-<tokens>."""
    fresh: bool = False
    select: str | None = None
    """How an expert is chosen. Default: a network's by the domain's histogram, a mixture's the most frequent."""
    sources: tuple[str, ...] = ()
    """The domain's text, where it is not prepared or known."""
    lora: int | None = None
    """Train adapters of this rank instead, written to adapters/<name>."""
    fuse: bool = False
    """With `lora`: write the model with its adapters applied as well."""
    teacher: str | None = None
    """A pretrained run that is fine-tuned on the domain first, and that the model then learns from too."""

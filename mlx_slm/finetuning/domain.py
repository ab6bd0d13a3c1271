"""A domain set: the first documents of a domain in a seeded order, and the windows that decide when to stop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_slm.project import Project
from mlx_slm.storage.records import fingerprint
from mlx_slm.text.hub_tokenizer import open_tokenizer
from mlx_slm.text.prepare import STREAMED_TOKENS, ensure_set, prepare, text_needed
from mlx_slm.text.sources import Preparation
from mlx_slm.text.store import Store, first_windows
from mlx_slm.training.scoring import validation_windows


@dataclass(frozen=True)
class DomainSet:
    name: str
    tokens: int | None
    store: Store
    windows: np.ndarray
    valid: Store
    valid_windows: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Stored tokens of the domain set."""
        return int(self.store.lengths(self.windows).sum())

    @property
    def valid_tokens(self) -> int:
        """Tokens that an evaluation reads."""
        return int(self.valid.lengths(self.valid_windows).sum())

    def inputs(self) -> dict:
        """What it is made of, for a record."""
        return {
            "domain": self.name,
            "tokens": self.tokens,
            "windows": fingerprint([self.windows.tolist(), self.valid_windows.tolist()]),
            "data": self.store.fingerprint,
            "valid": self.valid.fingerprint,
        }


def domain_set(project: Project, name: str, tokens: int | None, sources: list[str]) -> DomainSet:
    """The set, prepared from `sources` where they are given, or where it was not."""
    workspace, config = project.workspace, project.config
    if sources:
        prepare(project, Preparation(name, sources))
    else:
        ensure_set(project, name, text_needed(tokens or STREAMED_TOKENS))
    store, valid = (Store(workspace.require_set(name, split)) for split in ("train", "valid"))
    store.require_tokenizer(open_tokenizer(workspace.tokenizer))
    windows = first_windows(store, tokens, config.data.seed)
    valid_windows = validation_windows(valid, config.finetuning.eval_tokens, config.data.seed)
    return DomainSet(name, tokens, store, windows, valid, valid_windows)

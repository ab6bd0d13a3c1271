"""The one interface through which work tells how it goes. `cli/` implements it with rich; the default says nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_slm.errors import Interrupted


class Report:
    """Silent. A subclass shows stages, lines, warnings and progress."""

    def line(self, text: str) -> None:
        """One finished line of information."""

    def warn(self, text: str) -> None:
        """Something the user should know, that does not stop the work."""

    @contextmanager
    def progress(self, title: str, total: float | None, unit: str) -> Iterator[Callable[..., None]]:
        """A running task; yields `advance(amount, total=None)`: this many more units are done, of a total that may have
        been estimated again."""
        yield lambda amount, total=None: None

    def confirm(self, question: str) -> bool:
        """Ask before long or large work. Only a terminal can say no."""
        return True


LONG = 600
"""Seconds of work that a user is asked about first."""


def require_agreement(report: Report, seconds: float) -> None:
    """Ask before work that takes long; raises Interrupted for a no."""
    if seconds > LONG and not report.confirm("start?"):
        raise Interrupted("not started; nothing was lost")


class Agreed(Report):
    """Another report, whose user has been asked and is not asked again."""

    def __init__(self, report: Report):
        self.report = report

    def line(self, text: str) -> None:
        self.report.line(text)

    def warn(self, text: str) -> None:
        self.report.warn(text)

    def progress(self, title: str, total: float | None, unit: str):
        return self.report.progress(title, total, unit)


def perplexity(nll: float) -> float:
    """exp of nats per token, 1e304 where that is beyond a number."""
    return math.exp(min(nll, 700.0))


def duration(seconds: float) -> str:
    """75 -> '1m15s', 7300 -> '2h02m'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"

"""Progress, lines and tables with rich: bars with rate and ETA on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mlx_slm.fields import format_size
from mlx_slm.report import Report

PLAIN_EVERY = 10.0
"""Seconds between plain progress lines."""


class RichReport(Report):
    def __init__(self, to_stderr: bool = False, quiet: bool = False, assume_yes: bool = False):
        self.console = Console(stderr=to_stderr, highlight=False, soft_wrap=True)
        self.errors = Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet, self.assume_yes = quiet, assume_yes

    def line(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.errors.print(Text("warning: ", style="yellow") + Text(text))

    def confirm(self, question: str) -> bool:
        if self.assume_yes or not self.console.is_terminal or not self.console.is_interactive:
            return True
        try:
            return self.console.input(f"{question} [Y/n] ").strip().lower() in ("", "y", "yes")
        except EOFError:
            return False

    @contextmanager
    def progress(self, title: str, total: float | None, unit: str) -> Iterator[Callable[..., None]]:
        if self.quiet:
            yield lambda amount, total=None: None
        elif self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                Amount(unit),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(title, total=total)
                yield lambda amount, total=None: bar.update(task, advance=amount, total=total)
        else:
            yield self._plain(title, total, unit)

    def _plain(self, title: str, total: float | None, unit: str) -> Callable[..., None]:
        started = last = time.monotonic()
        done = 0.0

        def advance(amount: float, new_total: float | None = None) -> None:
            nonlocal done, last, total
            done += amount
            total = new_total or total
            now = time.monotonic()
            if now - last >= PLAIN_EVERY:
                last = now
                rate = done / (now - started)
                left = f", {max(0.0, total - done) / rate:.0f}s left" if total and rate else ""
                self.line(f"{title}: {_short(done)}{unit}, {_short(rate)}{unit}/s{left}")

        return advance

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Print a table; the first column is text, the others are numbers. Where a terminal is too narrow for it, each
        row is some lines of its own: nothing is left out or cut."""
        widths = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
        console = Console(highlight=False)
        needed = sum(widths) + 3 * len(columns) + 1
        if console.is_terminal and needed > console.width:
            console.print(Text(title, style="bold"), soft_wrap=True)
            for row in rows:
                console.print(Text(f"{columns[0]}: {row[0]}", style="bold"), soft_wrap=True)
                for column, cell in zip(columns[1:], row[1:], strict=True):
                    console.print(Text(f"  {column}: {cell}"), soft_wrap=True)
            return
        table = Table(title=title, title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=True, min_width=widths[index])
        for row in rows:
            table.add_row(*map(Text, row))
        console.width = max(console.width if console.is_terminal else 120, needed)
        console.print(table)


class Amount(ProgressColumn):
    """'12.3MB  4.1MB/s'."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task) -> Text:
        speed = f"  {_short(task.speed)}{self.unit}/s" if task.speed else ""
        return Text(f"{_short(task.completed)}{self.unit}{speed}")


def _short(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.1f}{unit}"
    return format_size(int(value))

"""Records, and what is done with them: Markdown, numbers in words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def records(name: str) -> list[dict]:
    text = (ROOT / "docs" / "records" / name).read_text()
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join(
            "|" + "|".join(cells) + "|" if line == 1 else "| " + " | ".join(cells) + " |"
            for line, cells in enumerate(map(list, lines))
        )
        .replace("|  |", "| |")
        .replace("|  |", "| |")
    )


def percent(gains: list[float]) -> str:
    """The mean of differences of logarithms."""
    return f"{100 * math.expm1(sum(gains) / len(gains)):+.1f} %"


def ordered(rows: Iterable[dict], *keys: str) -> list[tuple]:
    """The distinct values of keys, in the order of the record."""
    return list(dict.fromkeys(tuple(r[key] for key in keys) for r in rows))


def of(rows: Iterable[dict], **values: object) -> list[float]:
    """The perplexities of the rows that have these values, in the order of the record."""
    return [r["perplexity"] for r in rows if all(r[key] == value for key, value in values.items())]


def shown(values: list[float], digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values) or "-"

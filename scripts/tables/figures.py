"""The figures of docs/ from their records; each PNG says which record it was drawn from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlx_slm.experts.geometry import draw as draw_experts
from mlx_slm.study.figures import draw as draw_study
from mlx_slm.study.run import as_now
from scripts.tables.pools import draw as draw_pools
from scripts.tables.records import ROOT, records

DOCS = ROOT / "docs"


def study(rows: list[dict], folder: Path, name: str) -> list[Path]:
    return draw_study([as_now(row) for row in rows], name, folder)


DRAWN: dict[str, tuple[Callable[[Any, Path], Any], tuple[str, ...]]] = {
    "2026-11-28-xeon-study-mini.jsonl": (partial(study, name="study-three"), ("study-three-cost.png",)),
    "2026-11-30-xeon-study-five.jsonl": (
        lambda rows, into: study([r for r in rows if r["method"] != "is" or r["k"] == 64], into, name="study-five"),
        ("study-five-cost.png", "study-five-finetuning.png"),
    ),
    "2026-12-01-xeon-pools.jsonl": (draw_pools, ("scale-pools.png",)),
    "2026-12-01-xeon-experts.json": (draw_experts, ("experts-pn.png",)),
}
"""Of each record: what draws it into a folder, and which of those figures the documents show."""


def fingerprint(record: str) -> str:
    return sha256((DOCS / "records" / record).read_bytes()).hexdigest()


def drawn_from(figure: Path) -> str | None:
    """The fingerprint of the record that a figure says it was drawn from."""
    with Image.open(figure) as image:
        return image.info.get("Record")


def draw_all() -> list[Path]:
    """Draw the figures whose record changed; returns them."""
    made = []
    for record, (draw, shown) in DRAWN.items():
        now = fingerprint(record)
        if all((DOCS / name).exists() and drawn_from(DOCS / name) == now for name in shown):
            continue
        with tempfile.TemporaryDirectory() as folder:
            draw(records(record), Path(folder))
            for name in shown:
                note = PngInfo()
                note.add_text("Record", now)
                with Image.open(Path(folder) / name) as image:
                    image.save(DOCS / name, pnginfo=note, optimize=True)
                made.append(DOCS / name)
    return made

"""Time and memory of `cluster` over the size of a pool, and of a step over a link of known speed (docs/scale.md)."""

from __future__ import annotations

from pathlib import Path

from mlx_slm.figures import new_figure, save_figure
from scripts.tables.records import records, table

POOLS = "2026-12-01-xeon-pools.jsonl"
LINKS = "2026-12-01-xeon-links.jsonl"


def _name(row: dict) -> str:
    return " x ".join(f"{width:,}" for width in row["tree"])


def _by_tree(rows: list[dict]) -> dict[str, list[dict]]:
    return {name: [row for row in rows if _name(row) == name] for name in dict.fromkeys(map(_name, rows))}


def learning(row: dict) -> float:
    """Seconds of k-means and of splitting."""
    return row["seconds_k-means"] + row.get("seconds_splitting", 0)


def pools() -> str:
    lines = []
    for name, rows in _by_tree(records(POOLS)).items():
        cells = [f"{row['seconds']:.0f} s, {row['rss_mb']:,} MB" for row in rows]
        lines.append([name, *cells, f"{learning(rows[-1]):.0f} s", f"{rows[-1]['seconds_assigning']:.0f} s"])
    sizes = ["100,000 windows", "a million", "ten million", "of these learning", "assigning"]
    return table(["clusters", *sizes], lines)


def draw(rows: list[dict], folder: Path) -> Path:
    figure = new_figure(8, 3.2)
    panels = figure.subplots(1, 2)
    for name, own in _by_tree(rows).items():
        windows = [row["windows"] for row in own]
        panels[0].plot(windows, [row["seconds"] for row in own], marker="o", label=name)
        panels[1].plot(windows, [row["rss_mb"] for row in own], marker="o", label=name)
    for panel, label in zip(panels, ("seconds of cluster", "MB, at most"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="windows", ylabel=label)
    panels[1].set(ylim=(50, 5000))
    panels[0].legend(title="clusters", fontsize=8)
    return save_figure(figure, folder / "scale-pools.png")


def steps() -> str:
    """What a step takes beyond one that sends nothing, beside its bytes over the speed of the link."""
    lines = []
    for row in records(LINKS):
        for wire, end in (("fp32", ""), ("bf16", "_bf16")):
            size, alone = row[f"bytes_as_it_is{end}"], row["seconds_nothing"]
            projected = size / (row["mbits"] * 1e6 / 8)
            more = [row[f"seconds_{kind}{end}"] - alone for kind in ("afterwards", "as_it_is")]
            lines.append(
                [f"{row['mbits']:,} Mbit/s", wire, f"{size / 1e6:.1f} MB", f"{alone:.2f} s", f"{projected:.2f} s"]
                + [f"{seconds:+.2f} s" for seconds in more]
            )
    head = ["link", "gradients", "sent", "step that sends nothing", "sent / speed"]
    return table([*head, "more, sent when all are there", "more, as it is"], lines)

"""Which documents of a set that was prepared resemble others, in it and in other sets."""

from __future__ import annotations

from pathlib import Path

from mlx_slm.errors import SlmError
from mlx_slm.project import Project
from mlx_slm.text.near import near_duplicates
from mlx_slm.text.store import Store


def compare(project: Project, name: str, train: Path) -> dict:
    """What resembles what, of a set whose training documents lie in `train`.

    `marked` are those that resemble an earlier or a held-out one, `within` and `held_out` count them, `generic` counts
    documents of the generic set that resemble a domain's held-out ones.
    """
    workspace, generic = project.workspace, project.config.data.generic
    own = [workspace.data(name, "test"), workspace.data(name, "valid"), train]
    domains = [other for other in workspace.sets() if other not in (name, generic)] if name == generic else []
    held_out = [workspace.data(other, split) for other in domains for split in ("test", "valid")]
    after = [workspace.data(generic, "train")] if name != generic and generic in workspace.sets() else []
    tokenizer = Store(own[-1]).manifest["inputs"]["tokenizer"]
    before, behind = ([store for path in paths if (store := _readable(path, tokenizer))] for paths in (held_out, after))
    stores, place = [*before, *map(Store, own), *behind], len(before) + 2
    with project.report.progress("looking for near-duplicates", None, ""):
        near = near_duplicates(stores)
    earlier = range(place)
    leaks = near.count(place, earlier[:-2]) if name == generic else 0
    if len(stores) > place + 1:
        leaks = near.count(place + 1, earlier)
    return {
        "marked": near.marked(place, range(place + 1)),
        "within": near.count(place, [place]),
        "held_out": near.count(place, earlier[-2:]),
        "generic": leaks,
        "compared": near.compared,
    }


def _readable(path: Path, tokenizer: str) -> Store | None:
    """The store of another set of this tokenizer; None for one that is damaged or half made."""
    try:
        store = Store(path)
    except SlmError:
        return None
    return store if store.manifest["inputs"]["tokenizer"] == tokenizer else None


def tell(project: Project, name: str, near: dict) -> None:
    """Say what `compare` gave, where there is something to say."""
    generic, drop = project.config.data.generic, project.config.data.drop_near_duplicates
    told = [
        f"{near[key]:,} {what}"
        for key, what in (("within", "resemble another one"), ("held_out", "resemble a held-out one"))
        if near[key]
    ]
    if told:
        every = drop and near["marked"].all()
        advice = "left out" if drop else "--drop-near-duplicates leaves them out"
        if every:
            advice = "all there are, so they stay: give more text, or held-out text that is none of it"
        project.report.line(f"near-duplicates among the training documents of {name}: {', '.join(told)} ({advice})")
    if near["generic"] and not (drop and name == generic):
        whose = "a domain" if name == generic else name
        project.report.warn(
            f"{near['generic']:,} documents of {generic} resemble held-out ones of {whose}, whose evaluations they "
            f"flatter: `mlx-slm prepare {generic} SOURCE... --fresh --drop-near-duplicates` leaves them out"
        )

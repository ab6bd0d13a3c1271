"""Which documents of a set that was prepared resemble others, in it and in other sets."""

from __future__ import annotations

from mlx_slm.project import Project
from mlx_slm.text.near import near_duplicates
from mlx_slm.text.store import Store


def compare(project: Project, name: str) -> dict:
    """What resembles what: `marked` are the training documents that resemble an earlier or a held-out one, `within`
    and `held_out` count them, `generic` counts those of the generic set that resemble a domain's held-out ones."""
    workspace, generic = project.workspace, project.config.data.generic
    own = [workspace.data(name, split) for split in ("test", "valid", "train")]
    domains = [other for other in workspace.sets() if other not in (name, generic)] if name == generic else []
    held_out = [workspace.data(other, split) for other in domains for split in ("test", "valid")]
    after = [workspace.data(generic, "train")] if name != generic and generic in workspace.sets() else []
    tokenizer = Store(own[-1]).manifest["inputs"]["tokenizer"]
    stores = [
        store for store in map(Store, (*held_out, *own, *after)) if store.manifest["inputs"]["tokenizer"] == tokenizer
    ]
    train = next(i for i, store in enumerate(stores) if store.directory == own[-1])
    with project.report.progress("looking for near-duplicates", None, ""):
        near = near_duplicates(stores)
    before = range(train)
    leaks = near.count(train, before[:-2]) if name == generic else 0
    if after and len(stores) > train + 1:
        leaks = near.count(train + 1, before)
    return {
        "marked": near.marked(train, range(train + 1)),
        "within": near.count(train, [train]),
        "held_out": near.count(train, before[-2:]),
        "generic": leaks,
        "compared": near.compared,
    }


def tell(project: Project, name: str, near: dict) -> None:
    """Say what `compare` gave, where there is something to say."""
    generic, drop = project.config.data.generic, project.config.data.drop_near_duplicates
    told = [
        f"{near[key]:,} {what}"
        for key, what in (("within", "resemble another one"), ("held_out", "resemble a held-out one"))
        if near[key]
    ]
    if told:
        advice = "left out" if drop else "--drop-near-duplicates leaves them out"
        project.report.line(f"near-duplicates among the training documents of {name}: {', '.join(told)} ({advice})")
    if near["generic"] and not (drop and name == generic):
        whose = "a domain" if name == generic else name
        project.report.warn(
            f"{near['generic']:,} documents of {generic} resemble held-out ones of {whose}, whose evaluations they "
            f"flatter: `mlx-slm prepare {generic} SOURCE... --fresh --drop-near-duplicates` leaves them out"
        )

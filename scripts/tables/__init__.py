"""Write the tables of the documents from their records: `python -m scripts.tables`; a test says when one differs.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is one of `TABLES`, which makes its
lines from files of docs/records.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from scripts.tables import benchmarks, five, miniature, models, pools, recipes, scale, study
from scripts.tables.records import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def rendered(page: str) -> str:
    """A page with its tables as their records have them."""
    return PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}\n{place[3]}", page)


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (
        models.quickstart,
        models.published,
        models.quantised,
        study.study_order,
        study.study_against,
        study.study_crossing,
        study.study_sizes,
        study.study_others,
        benchmarks.beside_others,
        benchmarks.parts,
        benchmarks.machines,
        miniature.miniature_order,
        miniature.miniature_generic,
        miniature.miniature_choice,
        miniature.miniature_helps,
        miniature.encoders_agreement,
        miniature.encoders_models,
        recipes.early_mixing,
        recipes.early_mixing_16k,
        recipes.cooldown,
        recipes.replay,
        recipes.continued,
        recipes.soup,
        recipes.learned_weights,
        five.five_64k,
        five.five_16k,
        five.best,
        five.five_others,
        five.five_costs,
        five.over_clusters,
        five.drawn,
        scale.ring,
        scale.links,
        scale.trees,
        pools.pools,
        pools.steps,
        scale.c4,
        scale.rank_faults,
    )
}

"""The tables of the documents are those of their records."""

from pathlib import Path

import pytest

from scripts import tables
from scripts.tables.figures import DRAWN, drawn_from, fingerprint
from scripts.tables.study import seeds, study_against

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_their_records(page):
    text = page.read_text()
    assert tables.rendered(text) == text, "run `python -m scripts.tables`, or bring the record up to date"


def test_every_table_stands_somewhere():
    placed = [name for page in tables.PAGES for _, name, _ in tables.PLACE.findall(page.read_text())]
    assert sorted(placed) == sorted(tables.TABLES), "each once"


@pytest.mark.parametrize("record", DRAWN)
def test_figures_say_which_record_they_were_drawn_from(record):
    for name in DRAWN[record][1]:
        assert drawn_from(ROOT / "docs" / name) == fingerprint(record), "run `python -m scripts.tables`"


def test_a_number_that_was_changed_by_hand_is_noticed():
    page = ROOT / "docs" / "results.md"
    text = page.read_text()
    assert "| pubmed | SLM | 39.4, 40.2 |" in text
    changed = text.replace("| pubmed | SLM | 39.4, 40.2 |", "| pubmed | SLM | 39.3, 40.2 |")
    assert tables.rendered(changed) == text != changed


def test_a_cell_by_hand():
    """From the record itself: SLM-is on freelaw after 6M tokens, both seeds, against SLM's."""
    small, sampled = (seeds(m, "freelaw", 6_000_000, 64_000) for m in (("slm", None, None), ("is", 64, None)))
    assert [round(value, 1) for value in small] == [48.9, 48.9] and [round(v, 1) for v in sampled] == [43.5, 43.1]
    mean = ((sampled[0] * sampled[1]) / (small[0] * small[1])) ** 0.5 - 1
    assert f"| SLM-is, k = 64 | freelaw | -7.6 % | {100 * mean:+.1f} % |" in study_against()

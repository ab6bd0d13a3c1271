"""Eq. 1, the paper's tables and its recommendation."""

import pytest

from mlx_slm.config import Config
from mlx_slm.costs import (
    PAPER_COSTS,
    PAPER_RATES,
    Cost,
    Rates,
    costs_of_budgets,
    finetuning_tokens,
    recommend,
)
from mlx_slm.models.projected import ProjectedShape
from mlx_slm.models.transformer import Shape


def test_equation_1():
    assert Cost(650, 0.02).total(50) == 651.0
    assert Cost(0, 130).total(7) == 910


@pytest.mark.parametrize(("size", "hours"), [(1e6, 0.02), (8e6, 0.07), (64e6, 0.5)])
def test_table_2_gives_the_specialization_costs_of_table_3(size, hours):
    found = costs_of_budgets(PAPER_RATES, 650, 130, int(size))
    for method in ("slm", "mix", "pn"):
        assert found[method].specialization == pytest.approx(hours, rel=0.02, abs=0.001)
    assert found["is"].specialization == pytest.approx(130 + hours, abs=0.01)
    assert found["pn"].total(1) == pytest.approx(PAPER_COSTS["pn"].total(1), rel=1e-3)


def test_tokens_of_fine_tuning():
    assert [finetuning_tokens(n) / 1e6 for n in (10**6, 8 * 10**6, 64 * 10**6)] == [9, 32, 224]


def test_table_3_gives_sampling_up_to_four_domains_and_a_network_from_six():
    chosen = {n: recommend(PAPER_COSTS, n, large_is_allowed=False)[0] for n in (1, 2, 3, 4, 6, 7, 50)}
    assert chosen == {1: "is", 2: "is", 3: "is", 4: "is", 6: "pn", 7: "pn", 50: "pn"}
    assert "equal at 5.0 domains" in recommend(PAPER_COSTS, 6, large_is_allowed=False)[1]


def test_the_three_corners_of_figure_1():
    assert recommend(PAPER_COSTS, 1, large_is_allowed=True)[0] == "llm"
    assert recommend(PAPER_COSTS, 1, large_is_allowed=False, specialization_hours=200)[0] == "is"
    method, reason = recommend(PAPER_COSTS, 1, large_is_allowed=False, specialization_hours=1)
    assert method == "pn" and "importance sampling takes 130 hours a domain, 1 are given" in reason
    assert recommend(PAPER_COSTS, 1, False, 1, network_fits=False)[0] == "mix"


def test_rates_from_one_measured_speed():
    flops = {"slm": 6e8, "pn": 9e8, "llm": 36e8, "lora": 24e8, "llm_forward": 12e8}
    rates = Rates.from_flops(1000.0, flops)
    assert rates.slm * 3600 == pytest.approx(1 / 1000)
    assert rates.llm / rates.slm == pytest.approx(6) and rates.llm_forward / rates.llm == pytest.approx(1 / 3)


def test_flops_of_the_papers_network_by_hand():
    """6 h P a group, P = 5 layers of two matrices of 1024 x 4096; the paper's 142k tokens a step in 32 groups."""
    config = Config(projection={"layers": [1, 2, 3, 4, 5]})
    base = Shape.of(config.model, 32_000, 1024)
    shape = ProjectedShape.of(config.projection, base)
    assert shape.projected_parameters == 5 * 2 * 1024 * 4096
    assert shape.flops_per_token(4096) == base.flops_per_token + 6 * 32 * 5 * 2 * 1024 * 4096 / 4096

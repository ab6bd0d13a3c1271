"""Eq. 1, the paper's tables and its recommendation."""

import pytest

from mlx_slm.config.files import load_config, shipped_configs
from mlx_slm.config.schema import Config
from mlx_slm.errors import SlmError
from mlx_slm.methods import METHODS
from mlx_slm.methods.costs import PAPER_COSTS, PAPER_PASSES, PAPER_RATES, SIZES, Cost, Rates, Spending
from mlx_slm.models.projected import ProjectedShape
from mlx_slm.models.shape import Shape
from mlx_slm.planning.recommend import recommend
from mlx_slm.study.grid import budgets_of, cells


def costs_of_budgets(*spent) -> dict[str, Cost]:
    return {method.name: method.cost(Spending(*spent)) for method in METHODS}


def finetuning_tokens(kind: str, domain_tokens: int, **more) -> float:
    return Spending(PAPER_RATES, 0, 0, domain_tokens, **more).tokens(kind)


def test_equation_1():
    assert Cost(650, 0.02).total(50) == 651.0
    assert Cost(0, 130).total(7) == 910


@pytest.mark.parametrize(
    ("size", "small", "large", "distilled"),
    [(10**6, 0.02, 0.12, 0.7), (8 * 10**6, 0.07, 0.5, 2.8), (64 * 10**6, 0.5, 3.5, 21)],
)
def test_table_2_gives_the_specialization_costs_of_table_3(size, small, large, distilled):
    found = costs_of_budgets(PAPER_RATES, 650, 130, size)
    for method in ("slm", "mix", "pn", "nopt"):
        assert found[method].specialization == pytest.approx(small, rel=0.02, abs=0.001)
    assert found["llm"].specialization == pytest.approx(large, rel=0.02)
    assert found["d"].specialization == pytest.approx(distilled, rel=0.02)
    assert found["is"].specialization == pytest.approx(130 + small, abs=0.01)
    assert found["pn"].total(1) == pytest.approx(PAPER_COSTS["pn"].total(1), rel=1e-3)


def test_table_2_gives_the_pretraining_costs_of_table_3():
    """The tokens of configs/study-paper.yaml at Table 2's rates."""
    rates = PAPER_RATES
    assert 240e9 * rates.slm == pytest.approx(530, rel=0.01) and 59e9 * rates.slm == pytest.approx(130, rel=0.01)
    assert 84e9 * rates.llm == pytest.approx(650, rel=0.01) and 180e9 * rates.pn == pytest.approx(650, rel=0.01)
    assert 240e9 * rates.slm + 171e9 * rates.llm == pytest.approx(1850, rel=0.01), "student and teacher of SLM-d"
    study = load_config(shipped_configs()["study-paper"])
    most = {trunk.partition("-")[0]: max(of) / 1e9 for trunk, of in budgets_of(cells(study)).items()}
    assert most == {
        "slm": 240,
        "llm": 171,
        "is": 59,
        "pn": 180,
        "mix": 295,
    }


def test_tokens_of_fine_tuning_grow_with_the_domain_set_up_to_the_limit():
    assert [finetuning_tokens("slm", n) / 1e6 for n in SIZES] == pytest.approx([9, 32, 224])
    for kind in PAPER_PASSES:
        found = [finetuning_tokens(kind, int(n)) for n in (1e4, 1e6, 1.1e6, 5e6, 8e6, 9e6, 6.4e7, 2e8)]
        assert found == sorted(found) and len(set(found)) == len(found)
    assert finetuning_tokens("d", 10**6, limit=5e6) == 5e6
    assert finetuning_tokens("slm", 8 * 10**6, patience=2, again=1.5) == pytest.approx((4 + 2) * 2.5 * 8e6)


LARGE = {"llm": "it has 771M parameters, the inference budget admits 126M"}


def test_table_3_gives_sampling_up_to_four_domains_and_a_network_from_six():
    chosen = {n: recommend(PAPER_COSTS, n, LARGE)[0] for n in (1, 2, 3, 4, 6, 7, 50)}
    assert chosen == {1: "is", 2: "is", 3: "is", 4: "is", 6: "pn", 7: "pn", 50: "pn"}
    assert "equal at 5.0 domains" in recommend(PAPER_COSTS, 6, LARGE)[1]
    assert "for one domain" in recommend(PAPER_COSTS, 1, LARGE)[1]


def test_going_on_from_one_model_moves_the_crossover_from_5_to_17_domains():
    """Of 130 hours 97.5 are paid once: for 7 domains 97.5 + 7 x 32.5 = 325; (650 - 97.5) / 32.5 = 17."""
    costs = costs_of_budgets(PAPER_RATES, 650, 130, 10**6)
    assert costs["cis"].generic == 97.5 and costs["cis"].specialization == pytest.approx(32.52, abs=0.01)
    assert costs["cis"].total(1) == pytest.approx(costs["is"].total(1)), "the same model has seen as much"
    chosen = {n: recommend(costs, n, LARGE)[0] for n in (1, 2, 16, 18)}
    assert chosen == {1: "is", 2: "cis", 16: "cis", 18: "pn"}
    reason = recommend(costs, 7, LARGE)[1]
    assert "takes 325 hours in all, a projected network 650" in reason and "from scratch 910" in reason
    assert "equal at 17.0 domains" in reason
    assert recommend(costs, 1, LARGE | {"is": "it takes 130 hours a domain, 40 are given"})[0] == "cis"
    assert recommend(costs, 7, LARGE | {"cis": "it takes 33 hours a domain, 1 are given"})[0] == "pn"


def test_the_three_corners_of_figure_1():
    assert recommend(PAPER_COSTS, 1, {})[0] == "llm"
    assert recommend(PAPER_COSTS, 1, LARGE)[0] == "is"
    hours = LARGE | {"is": "it takes 130 hours a domain, 1 are given"}
    method, reason = recommend(PAPER_COSTS, 1, hours)
    assert method == "pn" and "importance sampling: it takes 130 hours a domain, 1 are given" in reason
    assert recommend(PAPER_COSTS, 1, hours | {"pn": "memory"})[0] == "mix"
    assert recommend(PAPER_COSTS, 50, LARGE | {"pn": "memory", "mix": "memory"})[0] == "is"
    assert recommend(PAPER_COSTS, 50, hours | {"pn": "memory", "mix": "memory"})[0] == "slm"
    with pytest.raises(SlmError, match="no method fits: too large"):
        recommend(PAPER_COSTS, 1, hours | dict.fromkeys(("slm", "pn", "mix"), "too large"))


def test_rates_from_one_measured_speed():
    flops = {"slm": 6e8, "pn": 9e8, "llm": 36e8, "lora": 24e8, "llm_forward": 12e8}
    rates = Rates.from_speeds({"slm": 1000.0}, flops)
    assert rates.slm * 3600 == pytest.approx(1 / 1000)
    assert rates.llm / rates.slm == pytest.approx(6) and rates.llm_forward / rates.llm == pytest.approx(1 / 3)


def test_flops_of_the_papers_network_by_hand():
    """6 h P a group, P = 5 layers of two matrices of 1024 x 4096; the paper's 142k tokens a step in 32 groups."""
    config = Config(projection={"layers": [1, 2, 3, 4, 5]})
    base = Shape.of(config.model, 32_000, 1024)
    shape = ProjectedShape.of(config.projection, base)
    assert shape.projected_parameters == 5 * 2 * 1024 * 4096
    assert shape.flops_per_token(4096) == base.flops_per_token + 6 * 32 * 5 * 2 * 1024 * 4096 / 4096


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name != "domains"])
def test_the_large_model_of_each_configuration_costs_about_as_many_times_the_small_one_as_the_papers(name):
    config = load_config(shipped_configs()[name])
    vocab, context = config.tokenizer.vocab_size, config.data.context_length
    small, large = (Shape.of(section, vocab, context).flops_per_token for section in (config.model, config.large))
    assert 4 < large / small < 6.5

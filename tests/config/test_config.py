import pytest
import yaml

from mlx_slm.config.files import dump_config, find_config, load_config, shipped_configs
from mlx_slm.config.schema import Config
from mlx_slm.errors import SlmError
from mlx_slm.fields import format_size, parse_size
from mlx_slm.models.shape import Shape


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_all_problems_are_reported_at_once_with_the_nearest_key(tmp_path):
    path = write(
        tmp_path, "training: {tokens: 1M, lerning_rate: 1.0, warmup_steps: -3}\nmodel: {dims: 100, num_heads: 7}\n"
    )
    with pytest.raises(SlmError) as error:
        load_config(path)
    text = str(error.value)
    assert "3 problems" in text
    assert "training.lerning_rate: unknown key (did you mean learning_rate?)" in text
    assert "training.warmup_steps" in text and "not a multiple of num_heads 7" in text


@pytest.mark.parametrize("horizon", ["{}", "{steps: 5, tokens: 1M}"])
def test_exactly_one_horizon(tmp_path, horizon):
    with pytest.raises(SlmError, match="exactly one of steps, tokens, passes and hours"):
        load_config(write(tmp_path, f"training: {horizon}"))


def test_set_replaces_a_value_and_the_horizon(tmp_path):
    path = write(tmp_path, "training: {tokens: 1M}\n")
    found = load_config(
        path, ("training.steps=7", "model.dims=64", "model.family=llama", "training.learning_rate=3e-3")
    )
    assert (found.training.steps, found.training.tokens, found.model.dims) == (7, None, 64)
    assert found.training.learning_rate == 0.003
    with pytest.raises(SlmError, match=r"section\.key=value"):
        load_config(path, ("training.steps",))
    with pytest.raises(SlmError, match=r"section\.key=value"):
        load_config(path, (".=1",))
    with pytest.raises(SlmError, match=r"yaml with --set finetuning\.micro_rows=3: finetuning: batch_rows 8 is"):
        load_config(path, ("finetuning.micro_rows=3",))
    with pytest.raises(SlmError, match="is a value, not a section"):
        load_config(path, ("training.tokens.x=1",))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.passes=true", "training.passes: true is not a number"),
        ("training.seed=yes", "training.seed: true is not a number"),
        ("training.steps=1e17", "training.steps: .*not a size"),
        ("training.steps=100000T", "training.steps: .*less than or equal to 1000000000"),
        ("clusters.restarts=1B", "clusters.restarts: .*less than or equal to 10000"),
        ("clusters.iterations=1M", "clusters.iterations: .*less than or equal to 10000"),
        ("finetuning.max_steps=2B", "finetuning.max_steps: .*less than or equal to"),
        ("model.rope_theta=1e-300", "model.rope_theta: .*greater than or equal to 1"),
        ("projection.spread=1e30", "projection.spread: .*less than or equal to 10"),
        ("projection.tensor_rate=1e30", "projection.tensor_rate: .*less than or equal to"),
        ("lora.scale=1e30", "lora.scale: .*less than or equal to"),
        ("distillation.tau=1e-30", "distillation.tau: .*greater than or equal to 0.01"),
        ("training.learning_rate=.inf", "training.learning_rate: .*finite"),
        ("training.eps=.nan", "training.eps: input should be"),
    ],
)
def test_numbers_beyond_reason_are_named(tmp_path, setting, message):
    with pytest.raises(SlmError, match=message):
        load_config(write(tmp_path, "{}"), (setting,))


def test_not_yaml_is_named_with_its_line(tmp_path):
    with pytest.raises(SlmError, match="not valid YAML.*line 2"):
        load_config(write(tmp_path, "training: {steps: 5}\n  model: x\n"))


def test_sizes():
    assert [parse_size(v) for v in ("1M", "32k", "2.5B", 7, "1_000")] == [10**6, 32_000, 2_500_000_000, 7, 1000]
    for bad in ("1X", "-3", "1.5", 1.5, True, "M"):
        with pytest.raises(ValueError):
            parse_size(bad)
    assert [format_size(v) for v in (10**6, 250_000, 1_500_000, 4097, 64)] == ["1M", "250k", "1.5M", "4097", "64"]
    assert all(parse_size(format_size(v)) == v for v in range(1, 200_000, 37))


def test_shipped_configurations_load_and_survive_a_round_trip(tmp_path):
    names = set(shipped_configs())
    assert {"mac", "paper", "mini", "quickstart", "domains"} <= names
    for name in names - {"domains"}:
        config = load_config(find_config(name))
        assert load_config(write(tmp_path, dump_config(config))) == config
        assert yaml.safe_load(dump_config(config))["data"]


def test_paper_configuration_has_the_papers_parameter_counts():
    config = load_config(find_config("paper"))
    counts = [
        Shape.of(model, config.tokenizer.vocab_size, config.data.context_length).num_parameters
        for model in (config.model, config.large)
    ]
    assert counts == [121_992_192, 759_365_376]


def test_the_former_name_of_a_key_holds_unless_both_are_given(tmp_path):
    former = write(tmp_path, "training: {tokens: 1M, checkpoint_layers: true}\n")
    assert load_config(former).training.recompute_layers is True
    assert "recompute_layers: true" in dump_config(load_config(former))
    assert load_config(former, ("training.recompute_layers=false",)).training.recompute_layers is False
    both = write(tmp_path, "training: {tokens: 1M, checkpoint_layers: true, recompute_layers: true}\n")
    with pytest.raises(SlmError, match=r"training: checkpoint_layers is the former name of recompute_layers: give one"):
        load_config(both)
    assert load_config(both, ("training.checkpoint_layers=false",)).training.recompute_layers is False


def test_values_that_make_no_sense_are_named(tmp_path):
    path = write(tmp_path, "training: {tokens: 1M}\n")
    for override, message in (
        ("data.field={", "not valid YAML"),
        ("model.dims=.inf", r"model\.dims: inf is not a size"),
        ("finetuning.micro_rows=3", "batch_rows 8 is not a multiple of micro_rows 3"),
        ("data.test_fraction=0.99", "leave no training text"),
    ):
        with pytest.raises(SlmError, match=message):
            load_config(path, (override,))


def test_unknown_configuration_lists_the_known():
    with pytest.raises(SlmError, match=r"did you mean paper\?.*mac"):
        find_config("papr")


def test_defaults_are_valid():
    assert Config().training.hours == 8

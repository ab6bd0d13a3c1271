import json
import math

import mlx.core as mx
import numpy as np
import pytest
from conftest import shape_of
from mlx.utils import tree_flatten

from mlx_slm.config.schema import Config, ModelConfig
from mlx_slm.export.model import export_model, load_exported
from mlx_slm.files import Damaged
from mlx_slm.models.families import FAMILIES
from mlx_slm.models.rope import RopeScaling
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.training.loss import next_token_loss

CONFIGS = {
    "gpt2": ModelConfig(family="gpt2", num_layers=3, dims=48, num_heads=4),
    "llama": ModelConfig(
        family="llama", num_layers=3, dims=48, num_heads=4, num_kv_heads=2, hidden_dims=112, rope_theta=5e4
    ),
    "llama3": ModelConfig(family="llama", num_layers=2, dims=48, num_heads=4, num_kv_heads=2, head_dims=16),
    "qwen2": ModelConfig(family="qwen2", num_layers=2, dims=48, num_heads=4, num_kv_heads=2),
    "qwen3": ModelConfig(family="qwen3", num_layers=2, dims=48, num_heads=4, num_kv_heads=2, head_dims=16),
}
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "llama3": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def make(family, vocab_size=400, context=64, recompute_layers=False):
    shape = shape_of(CONFIGS[family], vocab_size, context, published=family == "llama3")
    model = Transformer(shape, recompute_layers)
    parameters = initialise(shape, 1)
    # Norms and biases away from 1 and 0, so that leaving one out shows.
    flat = tree_flatten(parameters)
    for number, (_, value) in enumerate(flat):
        noise = mx.random.normal(value.shape, key=mx.random.key(number)) * 0.1
        value[...] = value + noise
    model.update(parameters)
    return model, parameters


@pytest.fixture(params=list(CONFIGS))
def family(request):
    return request.param


@pytest.fixture
def exported(family, tmp_path, tokenizer):
    model, parameters = make(family, tokenizer.vocab_size)
    path = export_model(
        tmp_path / "model", model.shape, parameters, tokenizer, {"tokenizer": tokenizer.fingerprint}, {}
    )
    return model, path


def tokens_for(model, rows=3):
    return np.random.default_rng(0).integers(0, model.shape.vocab_size, (rows, model.shape.context_length))


def test_logits_equal_transformers(exported, family):
    torch = pytest.importorskip("torch", reason="parity needs torch (extra: peers)")
    from transformers import AutoModelForCausalLM

    model, path = exported
    other = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()
    assert type(other).__name__ == ARCHITECTURES[family]
    assert sum(p.numel() for p in other.parameters()) == model.shape.num_parameters
    tokens = tokens_for(model)
    with torch.no_grad():
        expected = other(torch.tensor(tokens)).logits.numpy()
    assert np.abs(np.array(model.logits(mx.array(tokens))) - expected).max() < 1e-4


def test_loss_and_gradients_of_a_step_equal_transformers(exported, family):
    torch = pytest.importorskip("torch", reason="parity needs torch (extra: peers)")
    from transformers import AutoModelForCausalLM

    model, path = exported
    other = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    tokens = tokens_for(model)
    expected = other(torch.tensor(tokens), labels=torch.tensor(tokens)).loss
    expected.backward()
    parameters, batch = model.parameters(), mx.array(tokens)
    weights = mx.ones((len(tokens), tokens.shape[1] - 1))

    def loss(parameters):
        model.update(parameters)
        return next_token_loss(model, batch, weights) / weights.size

    found, gradients = mx.value_and_grad(loss)(parameters)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = dict(tree_flatten(FAMILIES[CONFIGS[family].family].to_hub(gradients)))
    theirs = {name.removeprefix("transformer."): p.grad.numpy() for name, p in other.named_parameters()}
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert np.abs(np.array(ours[name]) - value).max() < 1e-4 * max(1.0, np.abs(value).max()), name


def test_logits_equal_mlx_lm(exported):
    from mlx_lm import load

    model, path = exported
    other, tokenizer = load(str(path))
    tokens = mx.array(tokens_for(model))
    assert mx.abs(other(tokens) - model.logits(tokens)).max() < 1e-4
    names = {name for name, _ in tree_flatten(other.parameters())}
    assert names == {name for name, _ in tree_flatten(model.parameters())}
    assert tokenizer.eos_token_ids == {1}


def test_export_and_load_are_inverse_and_damage_is_noticed(exported):
    model, path = exported
    again, _ = load_exported(path)
    for (name, a), (_, b) in zip(tree_flatten(model.parameters()), tree_flatten(again.parameters()), strict=True):
        assert mx.array_equal(a, b), name
    weights = path / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(Damaged, match=r"model\.safetensors is damaged"):
        load_exported(path)


def test_counts_are_exact(family):
    model, parameters = make(family)
    assert sum(value.size for _, value in tree_flatten(parameters)) == model.shape.num_parameters
    assert {n for n, _ in tree_flatten(parameters)} == {n for n, _ in tree_flatten(model.parameters())}


def test_initialisation_is_gpts(family):
    shape = Shape.of(CONFIGS[family], 4000, 64)
    flat = dict(tree_flatten(initialise(shape, 0)))
    deviations = {}
    for name, value in flat.items():
        kind = (
            "norm"
            if value.ndim == 1
            else "residual"
            if name.split(".")[-2] in ("c_proj", "o_proj", "down_proj")
            else "matrix"
        )
        if kind == "norm":
            assert (value == (0.0 if name.endswith("bias") else 1.0)).all()
        else:
            deviations.setdefault(kind, []).append(float(mx.sqrt(mx.square(value).mean())))
    assert np.allclose(deviations["matrix"], 0.02, rtol=0.06)
    assert np.allclose(deviations["residual"], 0.02 / (2 * shape.num_layers) ** 0.5, rtol=0.06)
    again, other = (dict(tree_flatten(initialise(shape, seed))) for seed in (0, 1))
    assert all(mx.array_equal(flat[name], again[name]) for name in flat)
    assert all(mx.array_equal(flat[name], other[name]) == (flat[name].ndim == 1) for name in flat)


def test_checkpointed_layers_give_the_same_gradients(family):
    (plain, parameters), (checkpointed, _) = make(family), make(family, recompute_layers=True)
    tokens = mx.array(tokens_for(plain))

    def gradients(model):
        def loss(parameters):
            model.update(parameters)
            return mx.square(model(tokens)).sum()

        return dict(tree_flatten(mx.grad(loss)(parameters)))

    a, b = gradients(plain), gradients(checkpointed)
    for name in a:
        assert mx.allclose(a[name], b[name], rtol=1e-5, atol=1e-5 * float(mx.abs(a[name]).max())), name


def test_no_token_sees_its_future(family):
    model, _ = make(family)
    tokens = tokens_for(model)
    changed = tokens.copy()
    changed[:, 40:] = 7
    a, b = (np.array(model(mx.array(t))) for t in (tokens, changed))
    assert np.abs(a[:, :40] - b[:, :40]).max() < 1e-6 < np.abs(a[:, 40:] - b[:, 40:]).max()


def test_flops_by_hand_for_the_papers_models():
    """Per layer 12 d^2 weights (query, key, value, output, and an MLP of 4 d), the head V d; 12 L T d for attention."""
    small, large = (Shape.of(section, 32_000, 1024) for section in (Config().model, Config().large))
    assert small.flops_per_token == 6 * (7 * 12 * 1024**2 + 32_000 * 1024) + 12 * 7 * 1024 * 1024
    assert large.flops_per_token == 6 * (7 * 12 * 2816**2 + 32_000 * 2816) + 12 * 7 * 1024 * 2816
    assert round(large.flops_per_token / small.flops_per_token, 2) == 5.88
    llama = Shape.of(ModelConfig(family="llama", num_layers=2, dims=96, num_heads=4, num_kv_heads=2), 500, 64)
    layer = 2 * 96 * 96 + 2 * 96 * 48 + 3 * 96 * 256
    assert llama.flops_per_token == 6 * (2 * layer + 500 * 96) + 12 * 2 * 64 * 96
    wide = Shape.of(CONFIGS["qwen3"], 500, 64)
    layer = 48 * 16 * (4 + 2 + 2 + 4) + 3 * 48 * 128
    assert wide.flops_per_token == 6 * (2 * layer + 500 * 48) + 12 * 2 * 64 * (4 * 16), "attention is over all heads"


def test_a_shape_as_published_is_recorded():
    shape = shape_of(CONFIGS["llama3"], 400, 64, published=True)
    assert Shape(**json.loads(json.dumps(shape.to_dict()))) == shape
    assert not {"attention_bias", "rope_scaling"} & set(Shape.of(CONFIGS["llama"], 400, 64).to_dict())


def test_stretched_wavelengths_by_hand():
    """Head of 16, base 10,000: wavelengths 2 pi (1, 3.16, 10, 31.6, ...), turns in 64 tokens 10.2, 3.22, 1.02, 0.32."""
    factors = RopeScaling(8.0, 1.0, 4.0, 64).factors(16, 10_000.0)
    assert factors[0] == 1 and (factors[3:] == 8).all()
    for index, wavelength in ((1, 10**0.5), (2, 10.0)):
        smooth = (64 / (2 * math.pi * wavelength) - 1) / 3
        assert factors[index] == pytest.approx(1 / ((1 - smooth) / 8 + smooth))


def test_a_size_of_heads_is_recorded_only_where_it_is_one_of_its_own():
    """Records of before there was one stay what they are."""
    plain, own = Shape.of(CONFIGS["llama"], 400, 64), Shape.of(CONFIGS["qwen3"], 400, 64)
    assert "head_dims" not in plain.to_dict() and own.to_dict()["head_dims"] == 16
    assert Shape(**plain.to_dict()) == plain and Shape(**own.to_dict()) == own

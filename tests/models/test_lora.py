"""LoRA: the paper's count, mlx-lm's layers as the reference, its own loader for the adapter files."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import shape_of
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_slm.config.schema import ModelConfig
from mlx_slm.export.model import export_model
from mlx_slm.models.lora import Lora
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise

FAMILIES = [("gpt2", 4), ("llama", 4), ("llama", 2), ("llama3", 2), ("qwen2", 2), ("qwen3", 2)]


def make(family, num_kv_heads, rank=3):
    head = 16 if family in ("llama3", "qwen3") else None
    sizes = {"num_layers": 2, "dims": 32, "num_heads": 4, "num_kv_heads": num_kv_heads, "head_dims": head}
    config = ModelConfig(family=family.removesuffix("3") if family == "llama3" else family, **sizes)
    shape = shape_of(config, 400, 32, published=family == "llama3")
    lora = Lora(shape, rank, 4.0)
    adapters = tree_map(lambda x: 0.1 * mx.random.normal(x.shape, key=mx.random.key(x.size)), lora.initialise(1))
    return shape, lora, initialise(shape, 0), adapters


def logits(shape, parameters, tokens):
    model = Transformer(shape)
    model.update(parameters)
    return model.logits(tokens)


def test_the_papers_count():
    shape = Shape.of(ModelConfig(num_layers=7, dims=2816, num_heads=22), 32_000, 1024)
    assert Lora(shape, 64, 1.0).num_parameters == 7 * 2 * 64 * (2816 + 2816) == 5_046_272


def test_flops_by_hand():
    """Forward and the gradients of activations through everything, 4 a weight; gradients of the joint matrix of query,
    key and value, and of the head, 2 a weight; attention 12 L T d."""
    shape = Shape.of(ModelConfig(num_layers=7, dims=2816, num_heads=22), 32_000, 1024)
    d, head = 2816, 32_000 * 2816
    weights = 7 * 12 * d**2 + head
    assert Lora(shape, 64, 1.0).flops_per_token == 4 * weights + 2 * (7 * 3 * d**2 + head) + 12 * 7 * 1024 * d
    llama = Shape.of(ModelConfig(family="llama", num_layers=2, dims=32, num_heads=4, num_kv_heads=2), 400, 16)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * llama.hidden_dims
    adapted = 32 * 32 + 32 * 16
    expected = 4 * (2 * layer + 400 * 32) + 2 * (2 * adapted + 400 * 32) + 12 * 2 * 16 * 32
    assert Lora(llama, 4, 1.0).flops_per_token == expected


@pytest.mark.parametrize(("family", "num_kv_heads"), FAMILIES)
def test_new_adapters_add_nothing_and_count_what_is_trained(family, num_kv_heads):
    shape, lora, base, adapters = make(family, num_kv_heads)
    tokens = mx.array(np.arange(64).reshape(2, 32))
    assert mx.array_equal(logits(shape, lora.applied(base, lora.initialise(7)), tokens), logits(shape, base, tokens))
    assert lora.num_parameters == sum(value.size for _, value in tree_flatten(adapters))


@pytest.mark.parametrize(("family", "num_kv_heads"), FAMILIES)
def test_adapters_are_the_same_flat_and_as_a_file_gives_them(family, num_kv_heads):
    _, lora, base, adapters = make(family, num_kv_heads)
    tree = tree_unflatten(list(adapters.items()))
    for (name, one), (_, other) in zip(
        tree_flatten(lora.applied(base, adapters)), tree_flatten(lora.applied(base, tree)), strict=True
    ):
        assert mx.array_equal(one, other), name
    assert {n: v.shape for n, v in lora.to_mlx_lm(tree)[0].items()} == {
        n: v.shape for n, v in lora.to_mlx_lm(adapters)[0].items()
    }


@pytest.mark.parametrize(("family", "num_kv_heads"), FAMILIES)
def test_mlx_lm_reads_the_adapter_and_computes_the_same(family, num_kv_heads, tokenizer, tmp_path):
    from mlx_lm import load

    shape, lora, base, adapters = make(family, num_kv_heads)
    model = export_model(tmp_path / "base", shape, base, tokenizer, {"tokenizer": tokenizer.fingerprint}, {})
    arrays, config = lora.to_mlx_lm(adapters)
    (tmp_path / "adapter").mkdir()
    mx.save_safetensors(str(tmp_path / "adapter" / "adapters.safetensors"), arrays)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    tokens = mx.array(np.arange(64).reshape(2, 32))
    theirs, _ = load(str(model), adapter_path=str(tmp_path / "adapter"))
    fused = logits(shape, lora.applied(base, adapters), tokens)
    plain, _ = load(str(model))
    np.testing.assert_allclose(np.array(theirs(tokens)), np.array(fused), atol=1e-5)
    assert mx.abs(plain(tokens) - fused).max() > 1e-2, "the adapter makes a difference"


@pytest.mark.parametrize(("family", "num_kv_heads"), FAMILIES)
def test_gradients_are_those_of_mlx_lms_low_rank_layers(family, num_kv_heads, tokenizer, tmp_path):
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers

    shape, lora, base, adapters = make(family, num_kv_heads)
    tokens = mx.array(np.arange(64).reshape(2, 32))
    ours = mx.grad(lambda p: mx.square(logits(shape, lora.applied(base, p), tokens)).mean())(adapters)
    theirs, _ = load(str(export_model(tmp_path / "base", shape, base, tokenizer, {"tokenizer": ""}, {})))
    arrays, config = lora.to_mlx_lm(adapters)
    theirs.freeze()
    linear_to_lora_layers(theirs, config["num_layers"], config["lora_parameters"])
    theirs.load_weights(list(arrays.items()), strict=False)
    found = dict(tree_flatten(nn.value_and_grad(theirs, lambda m: mx.square(m(tokens)).mean())(theirs)[1]))
    assert {name for name in found if "lora" in name} == set(arrays) == set(found)
    for name, _, first, rows in lora.targets:
        joint, part = name.rpartition(".")[::2] if family == "gpt2" else (name, "")
        block = slice(lora.rank, None) if part == "v" else slice(0, lora.rank)
        a, b = found[f"{joint}.lora_a"][:, block], found[f"{joint}.lora_b"][block, first : first + rows]
        for mine, reference in ((ours[f"{name}.a"], a), (ours[f"{name}.b"], b)):
            assert mx.abs(mine - reference).max() < 1e-4 * mx.abs(reference).max(), name


def test_a_rank_that_cannot_be():
    with pytest.raises(ValueError, match="a rank from 1 to 32, not 33"):
        make("llama", 4, rank=33)

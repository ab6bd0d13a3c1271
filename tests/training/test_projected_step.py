"""The factored step of the projected network against plain autodiff through T, and against independent models."""

import gc
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_slm.config.schema import ModelConfig, ProjectionConfig, TrainingConfig
from mlx_slm.errors import SlmError
from mlx_slm.machine import runtime
from mlx_slm.models import layers
from mlx_slm.models.projected import ProjectedShape, initialise_network, stacked
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, for_products
from mlx_slm.text.rows import Soup
from mlx_slm.training.loss import linear_cross_entropy
from mlx_slm.training.optimizer import AdamW
from mlx_slm.training.projected_step import ProjectedStep, groups_that_fit, network_bytes, resolved


def make(family="llama", **changes):
    base = Shape.of(ModelConfig(family=family, num_layers=2, dims=32, num_heads=4), 60, 16)
    config = ProjectionConfig(**{"h": 3, "k": 5, "layers": [0, 1], "spread": 0.3} | changes)
    shape = ProjectedShape.of(config, base)
    return shape, initialise_network(shape, config, 0)


def batch(step, groups, rows=2):
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 60, (groups * rows, 17)).astype(np.int32)
    weights = (rng.random((groups * rows, 16)) < 0.9).astype(np.float32)
    return tokens, weights, rng.integers(0, 5, groups)


def copy(tree):
    return tree_map(lambda x: mx.array(np.array(x)), tree)


def soup(clusters, step):
    """Groups that combine three of the five experts, but for the first, which has its own."""
    rng = np.random.default_rng((step, 1))
    shares = rng.dirichlet(np.ones(3), len(clusters)).astype(np.float32)
    shares[0] = [1, 0, 0]
    return Soup(np.concatenate([clusters[:, None], rng.integers(0, 5, (len(clusters), 2))], axis=1), shares)


def reference(shape, optimizer, parameters, steps, groups, mixed=False):
    """Plain autodiff through E, M and T, and the plain update of the whole tree."""
    model, moments, norms = Transformer(shape.base), optimizer.init(parameters), []
    for step in range(steps):
        tokens, weights, clusters = map(mx.array, batch(step, groups))
        combined = soup(batch(step, groups)[2], step) if mixed else None

        def loss(parameters, tokens=tokens, weights=weights, clusters=clusters, combined=combined):
            if combined:
                dense = np.zeros((groups, 5), np.float32)
                np.add.at(dense, (np.arange(groups)[:, None], combined.clusters), combined.shares)
                parameters, clusters = parameters | {"E": mx.array(dense) @ parameters["E"]}, mx.arange(groups)
            model.update(for_products(stacked(parameters, clusters), runtime.compute_dtype()))
            hidden = model(tokens[:, :-1]).reshape(-1, shape.base.dims)
            return linear_cross_entropy(hidden, model.head, tokens[:, 1:].reshape(-1), weights.reshape(-1))

        value, gradients = mx.value_and_grad(loss)(parameters)
        total = weights.sum()
        parameters, moments, norm = optimizer.update(parameters, moments, gradients, total, value, mx.array(3e-3))
        mx.eval(parameters, moments, norm)
        norms.append(norm.item())
    return parameters, moments, norms


def assert_alike(found, expected, tolerance=1e-5):
    named = dict(tree_flatten(expected))
    for name, value in tree_flatten(found):
        np.testing.assert_allclose(np.array(value), np.array(named[name]), atol=tolerance, err_msg=name)


def distance(one, other) -> float:
    """L2 distance of two trees."""
    named = dict(tree_flatten(other))
    return math.sqrt(sum(float(np.square(np.array(x - named[name])).sum()) for name, x in tree_flatten(one)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("groups", "micro_groups", "mixed"), [(1, 1, False), (4, 4, False), (4, 2, False), (4, 1, False), (4, 2, True)]
)
def test_twenty_steps_equal_plain_autodiff(family, groups, micro_groups, mixed):
    shape, parameters = make(family)
    optimizer = AdamW(clip_norm=0.4, weight_decay=0.01, eps=1e-6)
    expected, moments, norms = reference(shape, optimizer, copy(parameters), 20, groups, mixed)
    step = ProjectedStep(Transformer(shape.base), optimizer, micro_groups, copy(parameters))
    for number in range(20):
        tokens, weights, clusters = batch(number, groups)
        _, norm, bad = step(tokens, weights, 3e-3, soup(clusters, number) if mixed else clusters)
        assert norm.item() == pytest.approx(norms[number], rel=1e-2 if runtime.on_gpu() else 1e-4) and not bad.item()
    if runtime.on_gpu():  # gradients are rounded in other places, and Adam moves the smallest as far as the largest
        moved, apart = (distance(tree, expected) for tree in (parameters, step.parameters))
        assert apart < 0.1 * moved
    else:
        assert_alike(step.parameters, expected)
        assert_alike(step.moments["m"], moments["m"])
    assert max(norms) > 0.4, "clipping was at work"


def test_a_step_that_is_not_finite_changes_nothing():
    shape, parameters = make()
    step = ProjectedStep(Transformer(shape.base), AdamW(), 2, copy(parameters))
    tokens, weights, clusters = batch(0, 2)
    weights[0, 0] = np.nan
    _, _, bad = step(tokens, weights, 1e-3, clusters)
    assert bad.item() == 1
    assert_alike(step.parameters, parameters, 0)


def test_the_rate_of_the_tensors_is_scaled():
    shape, parameters = make()
    moved = {}
    for rate in (1.0, 0.25):
        step = ProjectedStep(Transformer(shape.base), AdamW(), 4, copy(parameters), tensor_rate=rate)
        step(*batch(0, 4)[:2], 1e-3, batch(0, 4)[2])
        name = shape.matrices[0]
        moved[rate] = np.array(step.parameters["T"][name] - parameters["T"][name])
    np.testing.assert_allclose(moved[0.25], 0.25 * moved[1.0], atol=1e-7)


@pytest.mark.parametrize(("h", "micro_groups", "rows"), [(24, 2, 1), (4, 4, 4)])
def test_memory_is_that_of_the_network_and_of_a_plain_step(h, micro_groups, rows, monkeypatch):
    if runtime.on_gpu() and runtime.backend() == "cpu":  # MLX's attention is fused on a GPU alone
        monkeypatch.setattr(layers, "causal_attention", lambda q, k, v, scale: q * k * v)
    base = Shape.of(ModelConfig(family="llama", num_layers=4, dims=160, num_heads=4), 512, 64)
    config = ProjectionConfig(h=h, k=h)
    shape = ProjectedShape.of(config, base)
    step = ProjectedStep(Transformer(base), AdamW(), micro_groups, initialise_network(shape, config, 0))
    mx.eval(step.parameters, step.moments)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory() - 12 * shape.num_parameters
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, (4 * rows, 65)).astype(np.int32)
    for _ in range(2):
        mx.reset_peak_memory()
        mx.eval(step(tokens, np.ones((4 * rows, 64), np.float32), 1e-3, np.arange(4)), step.parameters, step.moments)
    measured = mx.get_peak_memory() - before
    assert 0.8 < network_bytes(shape, 4, rows, micro_groups, False) / measured < 1.8
    if h == 24:
        assert measured < 1.5 * 12 * shape.num_parameters, "far below what dT of all matrices would cost (2.3 times)"


def test_groups_that_fit_divide_those_of_a_step(monkeypatch):
    shape = ProjectedShape.of(ProjectionConfig(layers=[1, 2, 3, 4, 5]), Shape.of(ModelConfig(), 32_000, 1024))
    for gigabytes in (40, 48, 64, 192):
        monkeypatch.setattr(runtime, "memory_bytes", lambda g=gigabytes: g << 30)
        fit, again = groups_that_fit(shape, 8, 4)
        assert again == (network_bytes(shape, 8, 4, 1, False) > 0.8 * (gigabytes << 30))
        assert 8 % fit == 0 and network_bytes(shape, 8, 4, fit, again) <= 0.8 * (gigabytes << 30)
    monkeypatch.setattr(runtime, "memory_bytes", lambda: 16 << 30)
    with pytest.raises(SlmError, match=r"1,422,237,696 parameters\) needs about .* projection\.clusters_per_step"):
        groups_that_fit(shape, 8, 4)


def test_the_clusters_of_a_step_are_as_many_as_memory_and_cost_admit(monkeypatch):
    """A group for each of 56 rows of 1,024 tokens costs 6 h P / 1,024 a token, 1 % of the paper's expert."""
    shape = ProjectedShape.of(ProjectionConfig(layers=[1, 2, 3, 4, 5]), Shape.of(ModelConfig(), 32_000, 1024))
    training = TrainingConfig(steps=1, batch_rows=56)
    monkeypatch.setattr(runtime, "memory_bytes", lambda: 10**15)
    found = resolved(ProjectionConfig(), training, shape)
    assert (found.h, found.clusters_per_step) == (32, 56)
    short = ProjectedShape.of(ProjectionConfig(), Shape.of(ModelConfig(), 32_000, 64))
    groups = resolved(ProjectionConfig(), training, short).clusters_per_step
    cost = 6 * 32 * short.projected_parameters / 64 / short.base.flops_per_token
    assert groups == max(g for g in (1, 2, 4, 7, 8, 14, 28, 56) if cost * g / 56 <= 0.1) and 1 < groups < 56
    monkeypatch.setattr(runtime, "memory_bytes", lambda: 48 << 30)
    few = resolved(ProjectionConfig(), training, shape).clusters_per_step
    assert few < found.clusters_per_step
    assert network_bytes(shape, few, 56 // few, 1, False) <= 0.8 * (48 << 30)
    assert resolved(ProjectionConfig(clusters_per_step=7), training, shape).clusters_per_step == 7
    whole = resolved(ProjectionConfig(), training.model_copy(update={"micro_rows": 8}), shape).clusters_per_step
    assert 8 % (56 // whole) == 0

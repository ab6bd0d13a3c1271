"""The projected network: the paper's counts, and its identities with plain small models."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import shape_of
from mlx.utils import tree_flatten, tree_unflatten

from mlx_slm.config.files import find_config, load_config
from mlx_slm.config.schema import ModelConfig, ProjectionConfig
from mlx_slm.errors import SlmError
from mlx_slm.models.projected import (
    ProjectedShape,
    coefficients,
    expert,
    initialise_network,
    network_of,
    stacked,
    tensor_rate,
)
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.training.loss import linear_cross_entropy


@pytest.mark.parametrize(("h", "millions"), [(16, 756), (32, 1422), (64, 2770)])
def test_the_papers_counts(h, millions):
    config = load_config(find_config("paper"))
    base = Shape.of(config.model, config.tokenizer.vocab_size, config.data.context_length)
    projection = config.projection.model_copy(update={"h": h, "k": h})
    assert ProjectedShape.of(projection, base).num_parameters == pytest.approx(millions * 1e6, rel=0.01)


def make(family="gpt2", **changes):
    settings = ModelConfig(family="llama" if family == "llama3" else family, num_layers=3, dims=32, num_heads=4)
    base = shape_of(settings, 60, 16, published=family == "llama3")
    config = ProjectionConfig(**{"h": 4, "k": 5, "layers": [0, 2]} | changes)
    shape = ProjectedShape.of(config, base)
    return shape, initialise_network(shape, config, 0)


def apart(parameters):
    """Far apart, so that an identity cannot hold by chance."""
    keys = mx.random.split(mx.random.key(9), 3)
    E = mx.random.normal(parameters["E"].shape, key=keys[0])
    M = {n: mx.random.normal(v.shape, key=keys[1]) for n, v in parameters["M"].items()}
    T = {n: v + 0.05 * mx.random.normal(v.shape, key=keys[2]) for n, v in parameters["T"].items()}
    return parameters | {"E": E, "M": M, "T": T}


def plain(shape, parameters):
    model = Transformer(shape.base)
    model.update(parameters)
    return model


def rows(count, seed=0):
    return mx.array(np.random.default_rng(seed).integers(0, 60, (count, 17)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama3", "qwen2", "qwen3"])
def test_the_count_is_that_of_the_tensors(family):
    shape, parameters = make(family)
    assert shape.num_parameters == sum(value.size for _, value in tree_flatten(parameters))


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama3", "qwen2", "qwen3"])
def test_anchored_every_expert_begins_as_the_small_model(family):
    shape, parameters = make(family)
    tokens = rows(2)[:, :16]
    small = plain(shape, initialise(shape.base, 0)).logits(tokens)
    for i in range(5):
        assert mx.array_equal(plain(shape, expert(parameters, i)).logits(tokens), small)
    assert len(np.unique(np.array(parameters["E"])[:, 1])) == 5, "but their coefficients differ"


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama3", "qwen2", "qwen3"])
def test_the_network_on_a_cluster_is_that_clusters_expert(family):
    shape, parameters = make(family)
    parameters = apart(parameters)
    ids, tokens = [3, 0, 3], rows(6)[:, :16]
    together = plain(shape, stacked(parameters, mx.array(ids))).logits(tokens)
    for group, i in enumerate(ids):
        alone = plain(shape, expert(parameters, i)).logits(tokens[2 * group : 2 * group + 2])
        np.testing.assert_allclose(np.array(together[2 * group : 2 * group + 2]), np.array(alone), rtol=1e-5, atol=1e-6)


def test_a_histogram_of_one_cluster_is_its_expert():
    shape, parameters = make()
    parameters = apart(parameters)
    for (name, one), (_, other) in zip(
        tree_flatten(expert(parameters, np.eye(5)[2])), tree_flatten(expert(parameters, 2)), strict=True
    ):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-6, err_msg=name)
    mean = dict(tree_flatten(expert(parameters, np.full(5, 0.2))))
    every = [dict(tree_flatten(expert(parameters, i))) for i in range(5)]
    for name in shape.matrices:
        np.testing.assert_allclose(np.array(mean[name]), np.mean([np.array(e[name]) for e in every], axis=0), atol=1e-6)


def loss_of(shape, parameters, tokens):
    model = plain(shape, parameters)
    hidden = model(tokens[:, :-1])
    targets = tokens[:, 1:].reshape(-1)
    return linear_cross_entropy(hidden.reshape(-1, 32), model.head, targets, mx.ones(targets.shape))


def test_the_hard_mixture_is_the_special_case_h_k_e_i_m_i():
    """W_i = T[i]: the loss and the gradient of T[i] are a plain model's, and those of absent clusters are zero."""
    shape, parameters = make(h=5, k=5)
    parameters = apart(parameters) | {"E": mx.eye(5), "M": {name: mx.eye(5) for name in parameters["M"]}}
    tokens, ids = rows(4), mx.array([1, 4])

    def network_loss(T):
        return loss_of(shape, stacked(parameters | {"T": T}, ids), tokens)

    total, dT = mx.value_and_grad(network_loss)(parameters["T"])
    losses = []
    for group, i in enumerate([1, 4]):
        own = dict(tree_flatten(parameters["shared"])) | {name: T[i] for name, T in parameters["T"].items()}
        for name, value in tree_flatten(expert(parameters, i)):
            assert mx.array_equal(value, own[name]), name
        part = tokens[2 * group : 2 * group + 2]
        loss, gradient = mx.value_and_grad(lambda p, part=part: loss_of(shape, p, part))(expert(parameters, i))
        losses.append(loss.item())
        flat = dict(tree_flatten(gradient))
        for name in shape.matrices:
            np.testing.assert_allclose(np.array(dT[name][i]), np.array(flat[name]), atol=2e-5, err_msg=name)
    assert total.item() == pytest.approx(sum(losses), rel=1e-6)
    for name in shape.matrices:
        assert not np.array(dT[name])[[0, 2, 3]].any()


def test_with_every_tensor_projected_and_sgd_the_experts_are_independent_models():
    """h = k, E = I, M = I, nothing shared, one cluster a step: training is that of k small models on their own rows."""
    base = Shape.of(ModelConfig(family="gpt2", num_layers=1, dims=32, num_heads=4), 60, 16)
    shape = ProjectedShape(base, h=3, k=3, m=3, layers=())
    alone = [dict(tree_flatten(initialise(base, seed))) for seed in range(3)]
    names = list(alone[0])
    fixed = {"shared": {}, "E": mx.eye(3), "M": {name: mx.eye(3) for name in names}}
    T = {name: mx.stack([one[name] for one in alone]) for name in names}
    for step, cluster in enumerate([0, 2, 2, 1, 0, 2]):
        tokens = rows(2, seed=step)
        dT = mx.grad(lambda T, c=cluster, t=tokens: loss_of(shape, expert(fixed | {"T": T}, c), t))(T)
        T = {name: T[name] - 1e-3 * dT[name] for name in names}
        own = alone[cluster]
        gradient = mx.grad(lambda p, t=tokens: loss_of(shape, tree_unflatten(list(p.items())), t))(own)
        alone[cluster] = {name: own[name] - 1e-3 * gradient[name] for name in names}
    for name in names:
        np.testing.assert_allclose(np.array(T[name]), np.stack([one[name] for one in alone]), atol=1e-6, err_msg=name)


def test_a_network_survives_the_names_of_a_file():
    _, parameters = make(layers=[2])
    again = network_of(tree_unflatten(tree_flatten(parameters)))
    assert set(again["T"]) == set(parameters["T"]) == set(again["M"])
    assert mx.array_equal(
        expert(again, 1)["model"]["h"][2]["mlp"]["c_fc"]["weight"], again["T"][next(iter(again["T"]))][0]
    )


def test_the_rate_of_the_tensors_moves_experts_as_fast_as_a_matrix():
    _, parameters = make()
    parameters = parameters | {
        "E": mx.array([[1.0, -1, 0, 0], [1, 1, 1, -1], [1, 0, 0, 0], [1, 0, 0, 2], [1, 0, 1, 0]])
    }
    assert tensor_rate(parameters) == pytest.approx(1 / np.mean([2, 4, 1, 3, 2]))


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (5, "no expert 5: the network has the experts 0 to 4"),
        (-1, "no expert -1"),
        (np.array([0.5, 0, 0, 0, 0, 0, 0.5]), "mass on cluster 6, and the network has the clusters 0 to 4"),
        (np.zeros(5), "do not all vanish"),
        (np.array([1, np.nan, 0, 0, 0]), "finite numbers"),
    ],
)
def test_an_expert_that_there_is_not(which, message):
    with pytest.raises(SlmError, match=message):
        expert(make()[1], which)


def test_a_layer_that_there_is_not():
    with pytest.raises(SlmError, match=r"projection.layers: there is no layer 3 among 0 to 2"):
        make(layers=[1, 3])


@pytest.mark.parametrize("m", [2, 3, 4, 6])
def test_anchored_for_any_m(m):
    """Coefficient 1 on T[0] for every expert, small ones that differ on all other tensors; all experts one model."""
    shape, parameters = make(m=m)
    tokens = rows(2)[:, :16]
    small = plain(shape, initialise(shape.base, 0)).logits(tokens)
    for c in coefficients(parameters, parameters["E"]).values():
        assert c.shape == (5, 4) and (c[:, 0] == 1).all()
        assert 0 < mx.abs(c[:, 1:]).max() < 0.2 and (mx.abs(c[:, 1:]).max(axis=0) > 0).all()
    for i in range(5):
        assert mx.array_equal(plain(shape, expert(parameters, i)).logits(tokens), small)
    assert shape.num_parameters == sum(value.size for _, value in tree_flatten(parameters))

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_slm.training.optimizer import AdamW, global_norm, learning_rate


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        "w": mx.array(rng.normal(size=(7, 5)).astype(np.float32) * scale),
        "b": mx.array(rng.normal(size=5).astype(np.float32) * scale),
    }


def test_global_norm_of_20m_elements_against_float64():
    """Five levels of blocks of 64: at most (5 * 63 + 3) u / 2 = 9.5e-6."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=n).astype(np.float32) for n in (12_000_000, 7_999_000, 1000)]
    exact = math.sqrt(sum(float(np.square(p, dtype=np.float64).sum()) for p in parts))
    found = global_norm({str(i): mx.array(p) for i, p in enumerate(parts)}).item()
    assert abs(found / exact - 1) < 1e-5


def test_steps_equal_torchs_adamw_with_norm_clipping():
    torch = pytest.importorskip("torch", reason="parity needs torch (extra: peers)")
    parameters = tree(0)
    names = ["w", "b"]
    theirs = [torch.tensor(np.array(parameters[n]), requires_grad=True) for n in names]
    other = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    ours = AdamW(betas=(0.9, 0.95), weight_decay=0.1, clip_norm=0.5)
    state, tokens = ours.init(parameters), 12.0
    for step in range(20):
        rate = learning_rate(step, 1e-2, 5, "cosine", 20)
        gradients = tree(step + 1, scale=(step % 3) * 0.3 + 0.01)
        for p, n in zip(theirs, names, strict=True):
            p.grad = torch.tensor(np.array(gradients[n]))
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        for group in other.param_groups:
            group["lr"] = rate
        other.step()
        summed = {n: g * tokens for n, g in gradients.items()}
        parameters, state, found = ours.update(
            parameters, state, summed, mx.array(tokens), mx.array(1.0), mx.array(rate)
        )
        assert abs(found.item() / float(norm) - 1) < 1e-5
    for p, n in zip(theirs, names, strict=True):
        assert np.abs(np.array(parameters[n]) - p.detach().numpy()).max() < 1e-5


@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(bad):
    optimizer, parameters = AdamW(), tree(0)
    state = optimizer.init(parameters)
    one = (mx.array(1.0), mx.array(1.0), mx.array(0.1))
    parameters, state, _ = optimizer.update(parameters, state, tree(1), *one)
    gradients, loss = tree(2), mx.array(1.0)
    if bad == "gradient":
        gradients["b"][2] = float("inf")
    else:
        loss = mx.array(float("nan"))
    after, moved, _ = optimizer.update(parameters, state, gradients, mx.array(1.0), loss, mx.array(0.1))
    for (name, a), (_, b) in zip(tree_flatten([parameters, state]), tree_flatten([after, moved]), strict=True):
        assert mx.array_equal(a, b) != name.endswith("bad"), name
    assert moved["bad"].item() == 1
    _, moved, _ = optimizer.update(after, moved, tree(3), *one)
    assert moved["bad"].item() == 0 and moved["updates"].item() == 2


def test_schedule():
    rates = [learning_rate(s, 1.0, 4, "constant", 10) for s in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = [learning_rate(s, 1.0, 4, "cosine", 10) for s in range(11)]
    assert cosine[4] == 1.0 and abs(cosine[7] - 0.55) < 1e-12 and abs(cosine[10] - 0.1) < 1e-12

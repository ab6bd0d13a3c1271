"""The distillation loss and its gradients against plain softmaxes and autodiff."""

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_slm.models import ops
from mlx_slm.training.distillation import Head, linear_distillation
from mlx_slm.training.loss import linear_cross_entropy


def make(n=60, d=24, e=40, v=333):
    rng = np.random.default_rng(0)
    found = (rng.normal(size=shape) for shape in ((n, d), (v, d), (n, e), (v, e)))
    arrays = [mx.array(x.astype(np.float32)) for x in found]
    return *arrays, mx.array(rng.integers(0, v, n)), mx.array(rng.random(n, np.float32))


def reference(hidden, head, teacher_hidden, teacher_head, targets, weights, a, tau):
    logits, theirs = hidden @ head.T, teacher_hidden @ teacher_head.T
    ours = nn.log_softmax(logits / tau, axis=-1)
    wanted = nn.log_softmax(theirs / tau, axis=-1)
    kl = (mx.exp(wanted) * (wanted - ours)).sum(axis=-1)
    return ((a * nn.losses.cross_entropy(logits, targets) + (1 - a) * tau**2 * kl) * weights).sum()


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("rows", [7, 60])
@pytest.mark.parametrize(("a", "tau"), [(0.0, 1.0), (0.5, 1.0), (0.3, 2.0), (0.0, 4.0), (1.0, 2.0)])
def test_value_and_gradients(a, tau, rows, vectorised, monkeypatch):
    monkeypatch.setattr(ops, "scalar_exp", lambda: vectorised)
    hidden, head, *others = make()
    ours = mx.value_and_grad(
        lambda h, w: 3 * linear_distillation(Head(h, w), Head(*others[:2]), others[2:], a, tau, rows), (0, 1)
    )(hidden, head)
    theirs = mx.value_and_grad(lambda h, w: 3 * reference(h, w, *others, a, tau), (0, 1))(hidden, head)
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-5)
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert mx.abs(one - other).max() < 1e-5 * mx.abs(other).max()


def test_with_a_of_one_it_is_the_cross_entropy():
    hidden, head, teacher_hidden, teacher_head, targets, weights = make()
    found = linear_distillation(Head(hidden, head), Head(teacher_hidden, teacher_head), (targets, weights), 1.0, 2.0)
    assert found.item() == pytest.approx(linear_cross_entropy(hidden, head, targets, weights).item(), rel=1e-6)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it():
    hidden, head, _, _, targets, weights = make()
    value, gradients = mx.value_and_grad(
        lambda h, w: linear_distillation(Head(h, w), Head(hidden, head), (targets, weights), 0.0, 2.0), (0, 1)
    )(hidden, head)
    assert abs(value.item()) < 1e-3 and max(mx.abs(g).max().item() for g in gradients) < 1e-5


def test_the_logits_of_neither_model_exist_at_once():
    hidden, head, teacher_hidden, teacher_head, targets, weights = make(n=2048, v=4096)
    mx.eval(hidden, head, teacher_hidden, teacher_head)
    peaks = {}
    for rows in (2048, 128):
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        compute = mx.compile(
            mx.value_and_grad(
                lambda h, w, rows=rows: linear_distillation(
                    Head(h, w), Head(teacher_hidden, teacher_head), (targets, weights), 0.5, 2.0, rows
                ),
                (0, 1),
            )
        )
        mx.eval(compute(hidden, head))
        peaks[rows] = mx.get_peak_memory() - before
    assert peaks[128] < 0.3 * peaks[2048]

import gc

import mlx.core as mx
import numpy as np
import pytest

from mlx_slm.config.schema import ModelConfig
from mlx_slm.errors import SlmError
from mlx_slm.machine import runtime
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.training.optimizer import AdamW
from mlx_slm.training.step import TrainingStep, measure_speed, rows_that_fit, training_bytes


@pytest.mark.parametrize(
    ("family", "layers", "dims", "vocab_size", "context", "rows"),
    [("llama", 4, 128, 4096, 128, 16), ("gpt2", 3, 192, 1024, 256, 8), ("llama", 2, 64, 8192, 512, 4)],
)
def test_the_estimate_of_memory_is_near_the_measured_peak(family, layers, dims, vocab_size, context, rows, monkeypatch):
    if runtime.on_gpu() and runtime.backend() == "cpu":  # MLX's attention is fused on a GPU alone
        monkeypatch.setattr(layers, "causal_attention", lambda q, k, v, scale: q * k * v)
    shape = Shape.of(ModelConfig(family=family, num_layers=layers, dims=dims, num_heads=4), vocab_size, context)
    step = TrainingStep(Transformer(shape), AdamW(), rows, initialise(shape, 0))
    mx.eval(step.parameters, step.moments)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory() - 12 * shape.num_parameters
    tokens = np.random.default_rng(0).integers(0, vocab_size, (rows, context + 1)).astype(np.int32)
    for _ in range(2):
        mx.reset_peak_memory()
        mx.eval(step(tokens, np.ones((rows, context), np.float32), 1e-3), step.parameters, step.moments)
    measured = mx.get_peak_memory() - before
    assert 0.8 < training_bytes(shape, rows) / measured < 1.8


def test_rows_that_fit_divide_the_batch(monkeypatch):
    shape = Shape.of(ModelConfig(), 32_000, 1024)
    for gigabytes in (8, 16, 64, 512):
        monkeypatch.setattr(runtime, "memory_bytes", lambda g=gigabytes: g << 30)
        rows, again = rows_that_fit(shape, 56)
        assert again == (training_bytes(shape, 1) > 0.8 * (gigabytes << 30)), "only where nothing fits otherwise"
        assert 56 % rows == 0 and training_bytes(shape, rows, again) <= 0.8 * (gigabytes << 30)
        bigger = [r for r in range(rows + 1, 57) if 56 % r == 0]
        assert not bigger or training_bytes(shape, bigger[0], again) > 0.8 * (gigabytes << 30)
        assert rows_that_fit(shape, 56, given=14)[0] == 14
        assert rows_that_fit(shape, 56, recompute_layers=True)[1]
    room = training_bytes(shape, 1) - 1
    monkeypatch.setattr(runtime, "memory_bytes", lambda: room * 5 // 4)
    most = max(rows for rows in (1, 2, 4, 7, 8) if training_bytes(shape, rows, True) <= room)
    assert rows_that_fit(shape, 56) == (most, True)
    with pytest.raises(SlmError, match="or leave training.recompute_layers out"):
        rows_that_fit(shape, 56, recompute_layers=False)
    monkeypatch.setattr(runtime, "memory_bytes", lambda: 2 << 30)
    with pytest.raises(SlmError, match=r"121,992,192 parameters\) needs about .* GB at the least, and 2\.0 GB"):
        rows_that_fit(shape, 56)


@pytest.mark.skipif(runtime.backend() != "cpu", reason="both forms are asked for")
def test_half_precision_takes_less(monkeypatch):
    """The paper's small model: with a row the weights decide, with all rows what is kept of each token."""
    shape, found = Shape.of(ModelConfig(), 32_000, 1024), {}
    for as_gpu in ("0", "1"):
        monkeypatch.setenv("MLX_SLM_AS_GPU", as_gpu)
        found[as_gpu] = [training_bytes(shape, rows) for rows in (8, 56)]
    (few, many), (half_few, half_many) = found["0"], found["1"]
    assert 1.3 < few / half_few < 1.5 and 2.1 < many / half_many < 2.3


def test_checkpointed_layers_take_less():
    shape = Shape.of(ModelConfig(), 32_000, 1024)
    of_eight_rows = [training_bytes(shape, 16, again) - training_bytes(shape, 8, again) for again in (True, False)]
    assert of_eight_rows[0] < 0.2 * of_eight_rows[1]


def test_measured_speed_is_of_whole_steps():
    shape = Shape.of(ModelConfig(family="llama", num_layers=1, dims=32, num_heads=4), 400, 32)
    assert 100 < measure_speed(shape, 4, 0.1) < 10**8

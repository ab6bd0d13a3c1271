"""What a user waits for: steps of training and fine-tuning, reading text, answering."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.micro import Case
from benchmarks.sizes import Size


def _batch(size: Size, rows: int):
    import numpy as np

    tokens = np.random.default_rng(0).integers(2, size.vocab_size, (rows, size.context + 1)).astype(np.int32)
    return tokens, np.ones((rows, size.context), np.float32)


def _training(size: Size, rows: int) -> Case:
    import mlx.core as mx

    from mlx_slm.models.transformer import Transformer, initialise
    from mlx_slm.training.optimizer import AdamW
    from mlx_slm.training.step import TrainingStep, rows_that_fit

    shape = size.shape
    step = TrainingStep(Transformer(shape), AdamW(), rows_that_fit(shape, rows), initialise(shape, 0))
    tokens, weights = _batch(size, rows)

    def work():
        with step.sharing_cores():
            mx.eval(step(tokens, weights, 1e-4), step.parameters)

    return Case(work, weights.size, "tokens/s", shape.flops_per_token * weights.size)


def slm_step(size: Size) -> Case:
    """A step of pretraining."""
    return _training(size, size.rows)


def finetuning_step(size: Size) -> Case:
    """A step of fine-tuning: the same on the 8 rows of the paper."""
    return _training(size, min(8, size.rows))


def pn_step(size: Size) -> Case:
    """A step of the projected network: all MLPs, but for the paper's size, the middle five of seven layers."""
    import mlx.core as mx
    import numpy as np

    from mlx_slm.config import ProjectionConfig
    from mlx_slm.models.projected import ProjectedShape, initialise_network
    from mlx_slm.models.transformer import Transformer
    from mlx_slm.training.optimizer import AdamW
    from mlx_slm.training.projected_step import ProjectedStep, groups_that_fit

    layers = list(range(1, size.num_layers - 1)) if size.name == "paper" else None
    config = ProjectionConfig(h=size.h, k=size.h, layers=layers)
    shape = ProjectedShape.of(config, size.shape)
    rows = size.rows // size.groups
    micro = groups_that_fit(shape, size.groups, rows)
    step = ProjectedStep(Transformer(shape.base), AdamW(), micro, initialise_network(shape, config, 0))
    tokens, weights = _batch(size, size.rows)
    clusters = np.arange(size.groups) % size.h

    def work():
        with step.sharing_cores():
            mx.eval(step(tokens, weights, 1e-4, clusters), step.parameters)

    flops = shape.flops_per_token(rows * size.context) * weights.size
    return Case(work, weights.size, "tokens/s", flops)


def _served(size: Size, bits: int | None):
    """mlx-lm's model of our exported form, whole or quantised."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.utils import load_model

    from mlx_slm import runtime
    from mlx_slm.export import huggingface_config, to_huggingface
    from mlx_slm.models.transformer import initialise
    from mlx_slm.training.checkpoint import save_arrays
    from mlx_slm.workspace import write_json

    shape = size.shape
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        write_json(path / "config.json", huggingface_config(shape, 0))
        save_arrays(path / "model.safetensors", to_huggingface(initialise(shape, 0), shape.family), {"format": "pt"})
        model, _ = load_model(path)
        model.set_dtype(runtime.compute_dtype())
        mx.eval(model.parameters())
    if bits:
        nn.quantize(model, group_size=64 if size.dims % 64 == 0 else 32, bits=bits)
        mx.eval(model.parameters())
    return model


def prefill(size: Size, bits: int | None = None) -> Case:
    """Reading a prompt with the exported model through mlx-lm."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    model = _served(size, bits)
    prompt = mx.array([[number % size.vocab_size for number in range(size.prompt)]])
    flops = 2 * size.shape.product_parameters * size.prompt
    return Case(lambda: mx.eval(model(prompt, cache=make_prompt_cache(model))), size.prompt, "tokens/s", flops)


def decode(size: Size, bits: int | None = None) -> Case:
    """Writing an answer token by token with the exported model through mlx-lm, greedily."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.generate import generate_step

    model = _served(size, bits)
    prompt = mx.array(list(range(2, 2 + min(8, size.prompt))))
    read = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    return Case(
        lambda: [None for _ in generate_step(prompt, model, max_tokens=size.answer)] and None,
        size.answer,
        "tokens/s",
        2 * size.shape.product_parameters * size.answer,
        read * size.answer,
    )


def prefill_8bit(size: Size) -> Case:
    """The same, quantised to 8 bits."""
    return prefill(size, 8)


def prefill_4bit(size: Size) -> Case:
    """The same, quantised to 4 bits."""
    return prefill(size, 4)


def decode_8bit(size: Size) -> Case:
    """The same, quantised to 8 bits."""
    return decode(size, 8)


def decode_4bit(size: Size) -> Case:
    """The same, quantised to 4 bits."""
    return decode(size, 4)


WHOLE = {
    function.__name__: function
    for function in (
        slm_step,
        finetuning_step,
        pn_step,
        prefill,
        prefill_8bit,
        prefill_4bit,
        decode,
        decode_8bit,
        decode_4bit,
    )
}

"""What a user waits for: steps of training and fine-tuning, reading text, answering."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.case import Case, batch, named
from benchmarks.sizes import Size


def training(size: Size, rows: int) -> Case:
    """A training step of the small model on this many rows."""
    import mlx.core as mx

    from mlx_slm.models.transformer import Transformer, initialise
    from mlx_slm.training.optimizer import AdamW
    from mlx_slm.training.step import TrainingStep, rows_that_fit

    shape = size.shape
    micro, again = rows_that_fit(shape, rows)
    step = TrainingStep(Transformer(shape, again), AdamW(), micro, initialise(shape, 0))
    tokens, weights = batch(size, rows)

    def work():
        with step.sharing_cores():
            mx.eval(step(tokens, weights, 1e-4), step.parameters)

    return Case(work, weights.size, "tokens/s", shape.flops_per_token * weights.size)


def slm_step(size: Size) -> Case:
    """A step of pretraining."""
    return training(size, size.rows)


def finetuning_step(size: Size) -> Case:
    """A step of fine-tuning: the same on the 8 rows of the paper."""
    return training(size, min(8, size.rows))


def network_of(size: Size):
    """(shape, configuration) of the projected network: all MLPs, for the paper's size the middle five of seven."""
    from mlx_slm.config.schema import ProjectionConfig
    from mlx_slm.models.projected import ProjectedShape

    layers = list(range(1, size.num_layers - 1)) if size.name == "paper" else None
    config = ProjectionConfig(h=size.h, k=size.h, layers=layers)
    return ProjectedShape.of(config, size.shape), config


def pn_step(size: Size) -> Case:
    """A step of the projected network."""
    import mlx.core as mx
    import numpy as np

    from mlx_slm.models.projected import initialise_network
    from mlx_slm.models.transformer import Transformer
    from mlx_slm.training.optimizer import AdamW
    from mlx_slm.training.projected_step import ProjectedStep, groups_that_fit

    shape, config = network_of(size)
    micro, again = groups_that_fit(shape, size.groups, size.pn_rows // size.groups)
    step = ProjectedStep(Transformer(shape.base, again), AdamW(), micro, initialise_network(shape, config, 0))
    tokens, weights = batch(size, size.pn_rows)
    clusters = np.arange(size.groups) % size.h

    def work():
        with step.sharing_cores():
            mx.eval(step(tokens, weights, 1e-4, clusters), step.parameters)

    flops = shape.flops_per_token(weights.size) * weights.size
    return Case(work, weights.size, "tokens/s", flops, size=f"{size.name}, h={size.h}")


def _served(size: Size, bits: int | None):
    """mlx-lm's model of our exported form, whole or quantised."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.utils import load_model

    from mlx_slm.export.model import huggingface_config
    from mlx_slm.machine import runtime
    from mlx_slm.models.families import FAMILIES
    from mlx_slm.models.transformer import initialise
    from mlx_slm.storage.arrays import save_arrays
    from mlx_slm.storage.records import write_json

    shape = size.shape
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        write_json(path / "config.json", huggingface_config(shape, 0))
        save_arrays(path / "model.safetensors", FAMILIES[shape.family].to_hub(initialise(shape, 0)), {"format": "pt"})
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
    work = lambda: list(generate_step(prompt, model, max_tokens=size.answer))  # noqa: E731
    flops = 2 * size.shape.product_parameters * size.answer
    return Case(work, size.answer, "tokens/s", flops, read * size.answer)


ANSWERS = 8
"""Prompts that are answered at once."""


def decode_batch(size: Size) -> Case:
    """Eight answers at once, whole weights, with mlx-lm's batched generation."""
    from mlx.utils import tree_flatten
    from mlx_lm.generate import BatchGenerator

    model = _served(size, None)
    prompts = [list(range(2 + i, 2 + i + min(8, size.prompt))) for i in range(ANSWERS)]
    read = sum(value.nbytes for _, value in tree_flatten(model.parameters()))

    def work():
        generator = BatchGenerator(model, max_tokens=size.answer)
        generator.insert(prompts)
        written = 0
        while found := generator.next_generated():
            written += len(found)
        generator.close()
        assert written == ANSWERS * size.answer

    tokens = ANSWERS * size.answer
    return Case(work, tokens, "tokens/s", 2 * size.shape.product_parameters * tokens, read * size.answer)


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


WHOLE = named(
    slm_step,
    finetuning_step,
    pn_step,
    prefill,
    prefill_8bit,
    prefill_4bit,
    decode,
    decode_batch,
    decode_8bit,
    decode_4bit,
)

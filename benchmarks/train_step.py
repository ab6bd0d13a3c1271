"""A training step of ours against mlx-lm's own trainer and PyTorch: the same llama, batch, dtype and machine.

    python -m benchmarks.train_step [--rounds 8] [--steps 3] [--json FILE] [--dims 256 --layers 4 ...]

Each side runs in a process of its own; they take turns, a few steps at a time, and never run at the same time. All but
the line marked `stock` have the same preloaded BLAS and allocator settings. Rows are exactly context + 1 tokens.
"""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks.harness import play, print_machine, records, show, write

STOCK = "mlx-lm stock"
STOCK_ROUNDS = 2  # of one step each: without a fast BLAS a step takes most of a minute
SIDES = ("mlx-slm", "mlx-lm", STOCK, "torch")


def parse_arguments() -> argparse.Namespace:
    parser = new_parser(__doc__, SIDES, rounds=8, rows=16)
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn")
    return parser.parse_args()


def new_parser(description: str, sides: tuple[str, ...], rounds: int, rows: int) -> argparse.ArgumentParser:
    """The options of a benchmark of training steps."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="turns that each side gets")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--dims", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--sides", default=",".join(sides), help="comma-separated")
    parser.add_argument("--json", help="write the results to this file")
    return parser


def make_rows(options):
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.integers(2, options.vocab_size, (64, options.context + 1)).astype(np.int32)


def llama_config(options, hidden: int) -> dict:
    return {
        "hidden_size": options.dims,
        "num_hidden_layers": options.layers,
        "intermediate_size": hidden,
        "num_attention_heads": options.heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": options.vocab_size,
        "tie_word_embeddings": True,
        "max_position_embeddings": options.context,
    }


def shape_of(options):
    from mlx_slm.config import ModelConfig
    from mlx_slm.models.transformer import Shape

    config = ModelConfig(family="llama", num_layers=options.layers, dims=options.dims, num_heads=options.heads)
    return Shape.of(config, options.vocab_size, options.context)


def run_ours(options, turn) -> None:
    import mlx.core as mx
    import numpy as np

    from mlx_slm.models.transformer import Transformer, initialise
    from mlx_slm.training.optimizer import AdamW
    from mlx_slm.training.step import TrainingStep

    shape, rows = shape_of(options), make_rows(options)
    step = TrainingStep(Transformer(shape), AdamW(), options.rows, initialise(shape, 0))
    weights = np.ones((options.rows, options.context), np.float32)
    done = 0

    def work():
        nonlocal done
        for _ in range(options.steps):
            first = done * options.rows % len(rows)
            in_flight = step(rows[first : first + options.rows], weights, 1e-4)
            done += 1
        mx.eval(step.parameters, in_flight)

    with step.sharing_cores():
        turn.serve(work, options.steps, mx.get_peak_memory)


def run_mlx_lm(options, turn) -> None:
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner import trainer

    class Turns(trainer.TrainingCallback):
        def on_train_loss_report(self, info):
            turn.report(1 / info["iterations_per_second"], mx.get_peak_memory())
            if not turn.wait():
                os._exit(0)

    model = Model(ModelArgs(model_type="llama", **llama_config(options, shape_of(options).hidden_dims)))
    rows = [(row.tolist(), 0) for row in make_rows(options)]
    arguments = trainer.TrainingArgs(
        batch_size=options.rows,
        iters=10**6,
        steps_per_report=options.steps,
        steps_per_save=10**9,
        max_seq_length=options.context + 1,
        adapter_file=os.devnull,
    )
    turn.ready()
    if turn.wait():
        sys.stdout = open(os.devnull, "w")
        trainer.train(model, optim.Adam(1e-4, bias_correction=True), rows, None, arguments, training_callback=Turns())


def run_torch(options, turn) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**llama_config(options, shape_of(options).hidden_dims)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.0)
    rows = torch.tensor(make_rows(options), dtype=torch.long)
    done = 0

    def work():
        nonlocal done
        for _ in range(options.steps):
            batch = rows[done * options.rows % len(rows) :][: options.rows]
            logits = model(batch[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            done += 1

    turn.serve(work, options.steps)


def run_stock(options, turn) -> None:
    run_mlx_lm(argparse.Namespace(**vars(options) | {"steps": 1}), turn)


RUNNERS = {"mlx-slm": run_ours, "mlx-lm": run_mlx_lm, STOCK: run_stock, "torch": run_torch}


def main() -> None:
    options = parse_arguments()
    from mlx_slm import runtime

    print_machine()
    shape = shape_of(options)
    print(
        f"alike on all sides: {shape.num_parameters:,} parameters, float32, one process each, "
        f"{options.rows} rows of exactly {options.context + 1} tokens, no padding\n"
        f"alike for mlx-slm and mlx-lm: mx.compile, BLAS {runtime.blas}, allocator settings of mlx_slm.runtime "
        f"({STOCK!r}: neither of the two, its BLAS is MLX's own); torch: eager, its own BLAS"
    )
    runners = {side: RUNNERS[side] for side in options.sides.split(",")}
    found = play(runners, options, options.rounds, STOCK, STOCK_ROUNDS)
    size = f"{shape.num_parameters / 1e6:.1f}M, vocabulary {options.vocab_size}, {options.rows} x {options.context}"
    rows = records("train_step", size, found, "mlx-slm", options.rows * options.context, "tokens/s")
    for row in rows:
        row["blas"] = None if row["peer"] == STOCK else runtime.blas
    show(rows, "mlx-slm")
    write(options.json, rows)


if __name__ == "__main__":
    main()

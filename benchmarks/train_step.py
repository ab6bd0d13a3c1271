"""A training step of ours against mlx-lm's own trainer and PyTorch: the same llama, batch, dtype and machine.

    python -m benchmarks.train_step [--rounds 8] [--steps 3] [--json FILE] [--dims 256 --layers 4 ...]

Each side runs in a process of its own; they take turns, a few steps at a time, and never run at the same time. All but
the line marked `stock` have the same preloaded BLAS and allocator settings. Rows are exactly context + 1 tokens.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time

STOCK = "mlx-lm stock"
STOCK_ROUNDS = 2  # of one step each: without a fast BLAS a step takes most of a minute
SIDES = ("mlx-slm", "mlx-lm", STOCK, "torch")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="turns that each side gets")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--dims", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--sides", default=",".join(SIDES), help="comma-separated")
    parser.add_argument("--json", help="write the results to this file")
    return parser.parse_args()


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
    turn.ready()
    sharing = step.sharing_cores()
    sharing.__enter__()
    while turn.wait():
        start = time.perf_counter()
        for _ in range(turn.steps):
            first = done * options.rows % len(rows)
            in_flight = step(rows[first : first + options.rows], weights, 1e-4)
            done += 1
        mx.eval(step.parameters, in_flight)
        turn.report((time.perf_counter() - start) / turn.steps, mx.get_peak_memory())


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
        steps_per_report=turn.steps,
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
    turn.ready()
    while turn.wait():
        start = time.perf_counter()
        for _ in range(turn.steps):
            batch = rows[done * options.rows % len(rows) :][: options.rows]
            logits = model(batch[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            done += 1
        turn.report((time.perf_counter() - start) / turn.steps, None)


RUNNERS = {"mlx-slm": run_ours, "mlx-lm": run_mlx_lm, STOCK: run_mlx_lm, "torch": run_torch}


class Turn:
    """One side's end of the pipe: it works only when it is told to."""

    def __init__(self, pipe, steps: int):
        self.pipe, self.steps = pipe, steps

    def ready(self) -> None:
        self.pipe.send("ready")

    def wait(self) -> bool:
        return self.pipe.recv()

    def report(self, seconds: float, peak: int | None) -> None:
        self.pipe.send((seconds, peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def child(side: str, options, pipe) -> None:
    if side == STOCK:
        import warnings

        import mlx.core  # noqa: F401  (before mlx_slm, which then cannot load a BLAS)

        warnings.simplefilter("ignore")
    import mlx_slm  # noqa: F401

    RUNNERS[side](options, Turn(pipe, 1 if side == STOCK else options.steps))


def main() -> None:
    options = parse_arguments()
    from mlx_slm import runtime

    machine = runtime.describe()
    print(f"{machine['device']}, {machine['memory_gb']} GB, {machine['backend']}, {machine['gflops']} GFLOP/s (1024^3)")
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    print(
        f"alike on all sides: {shape_of(options).num_parameters:,} parameters, float32, one process each, "
        f"{options.rows} rows of exactly {options.context + 1} tokens, no padding\n"
        f"alike for mlx-slm and mlx-lm: mx.compile, BLAS {runtime.blas}, allocator settings of mlx_slm.runtime "
        f"({STOCK!r}: neither of the two, its BLAS is MLX's own); torch: eager, its own BLAS"
    )
    context = multiprocessing.get_context("spawn")
    sides = {}
    for side in options.sides.split(","):
        ours, theirs = context.Pipe()
        process = context.Process(target=child, args=(side, options, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            ours.recv()
            sides[side] = (ours, process)
        except EOFError:
            print(f"{side}: not available here, left out")
    found: dict[str, list] = {side: [] for side in sides}
    for turn in range(options.rounds + 1):
        for side, (pipe, _) in sides.items():
            if side == STOCK and turn > STOCK_ROUNDS:
                continue
            pipe.send(True)
            result = pipe.recv()
            if turn:  # the first turn compiles
                found[side].append(result)
    for pipe, _ in sides.values():
        pipe.send(False)
    show(options, found)


def show(options, found: dict[str, list]) -> None:
    from mlx_slm import runtime

    tokens = options.rows * options.context
    medians = {side: statistics.median(seconds for seconds, _, _ in rounds) for side, rounds in found.items()}
    millions = shape_of(options).num_parameters / 1e6
    size = f"{millions:.1f}M, vocabulary {options.vocab_size}, {options.rows} x {options.context}"
    results = []
    print(f"\n{'side':<14}{'tokens/s':>10}{'quartiles (s/step)':>24}{'MLX peak':>12}{'RSS peak':>12}{'ours is':>10}")
    for side, rounds in found.items():
        times = sorted(seconds for seconds, _, _ in rounds)
        low, _, high = statistics.quantiles(times, n=4)
        peak, rss = rounds[-1][1], rounds[-1][2]
        ratio = medians[side] / medians["mlx-slm"] if "mlx-slm" in medians else None
        results.append(
            {
                "name": "train_step",
                "size": size,
                "device": runtime.device_name(),
                "dtype": "float32",
                "median_s": medians[side],
                "quartiles_s": [low, high],
                "value": tokens / medians[side],
                "unit": "tokens/s",
                "peer": None if side == "mlx-slm" else side,
                "ratio": ratio,
                "peak_bytes": peak,
                "rss_bytes": rss,
                "blas": None if side == STOCK else runtime.blas,
            }
        )
        shown_peak = f"{peak / 2**20:,.0f} MB" if peak else "-"
        quartiles = f"{low:.3f} - {high:.3f}"
        print(
            f"{side:<14}{tokens / medians[side]:>10,.0f}{quartiles:>24}{shown_peak:>12}"
            f"{rss / 2**20:>9,.0f} MB{ratio:>9.2f}x"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()

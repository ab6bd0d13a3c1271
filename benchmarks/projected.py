"""A step of the projected network against the plain model's at the same shape, and against autodiff through T.

    python -m benchmarks.projected [--h 4 16 32] [--rounds 6] [--json FILE] [--dims 256 --layers 4 ...]

`slm` is the plain training step, `autodiff` the gradient of the loss with respect to E, M and T and one compiled update
of them all: what the factored step replaces. All have the same rows, groups and micro-batch, BLAS and allocator. Sides
run in processes of their own and take turns. A ratio is how many times as fast the projected network's step is.
"""

from __future__ import annotations

import argparse

from benchmarks.harness import play, print_machine, records, show, write
from benchmarks.train_step import make_rows, new_parser, shape_of

OURS = "mlx-slm"
SIDES = (OURS, "slm", "autodiff")


def parse_arguments() -> argparse.Namespace:
    parser = new_parser(__doc__, SIDES, rounds=6, rows=64)
    parser.add_argument("--h", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--groups", type=int, default=4, help="clusters in a step")
    return parser.parse_args()


def network_of(options):
    from mlx_slm.config import ProjectionConfig
    from mlx_slm.models.projected import ProjectedShape, initialise_network

    config = ProjectionConfig(h=options.h, k=options.h)
    shape = ProjectedShape.of(config, shape_of(options))
    return shape, initialise_network(shape, config, 0)


def batches(options):
    """Endless (tokens, weights, clusters) of steps."""
    import numpy as np

    rows, rng = make_rows(options), np.random.default_rng(1)
    weights = np.ones((options.rows, options.context), np.float32)
    while True:
        yield rows[rng.integers(0, len(rows), options.rows)], weights, rng.integers(0, options.h, options.groups)


def run_network(options, turn) -> None:
    import mlx.core as mx

    from mlx_slm.models.transformer import Transformer
    from mlx_slm.training.optimizer import AdamW
    from mlx_slm.training.projected_step import ProjectedStep

    shape, parameters = network_of(options)
    step = ProjectedStep(Transformer(shape.base), AdamW(), options.groups, parameters)
    del parameters
    given = batches(options)

    def work():
        tokens, weights, clusters = next(given)
        mx.eval(step(tokens, weights, 1e-4, clusters), step.parameters)

    with step.sharing_cores():
        turn.serve(work, 1, mx.get_peak_memory)


def run_slm(options, turn) -> None:
    import mlx.core as mx

    from mlx_slm.models.transformer import Transformer, initialise
    from mlx_slm.training.optimizer import AdamW
    from mlx_slm.training.step import TrainingStep

    shape = shape_of(options)
    step = TrainingStep(Transformer(shape), AdamW(), options.rows, initialise(shape, 0))
    given = batches(options)

    def work():
        tokens, weights, _ = next(given)
        mx.eval(step(tokens, weights, 1e-4), step.parameters)

    with step.sharing_cores():
        turn.serve(work, 1, mx.get_peak_memory)


def run_autodiff(options, turn) -> None:
    import mlx.core as mx

    from mlx_slm.models.projected import stacked
    from mlx_slm.models.transformer import Transformer
    from mlx_slm.training.loss import linear_cross_entropy
    from mlx_slm.training.optimizer import AdamW
    from mlx_slm.training.step import add_trees, compiled_lanes, shared_out

    shape, parameters = network_of(options)
    model, optimizer = Transformer(shape.base), AdamW()
    moments = optimizer.init(parameters)

    def gradients(parameters, tokens, weights, ids):
        def loss(parameters):
            model.update(stacked(parameters, ids))
            hidden = model(tokens[:, :-1]).reshape(-1, shape.base.dims)
            return linear_cross_entropy(hidden, model.head, tokens[:, 1:].reshape(-1), weights.reshape(-1))

        return mx.value_and_grad(loss)(parameters)

    lanes, update, given = compiled_lanes(gradients, options.groups), mx.compile(optimizer.update), batches(options)

    def work():
        nonlocal parameters, moments
        import numpy as np

        tokens, weights, clusters = next(given)
        per_group, total, found = options.rows // options.groups, None, None
        for part, stream, compute in shared_out(np.arange(options.groups), lanes):
            rows = slice(part[0] * per_group, (part[-1] + 1) * per_group)
            with mx.stream(stream):
                loss, one = compute(parameters, *map(mx.array, (tokens[rows], weights[rows], clusters[part])))
            total, found = (loss, one) if total is None else (total + loss, add_trees(found, one))
        count = mx.array(float(weights.sum()))
        parameters, moments, _ = update(parameters, moments, found, count, total, mx.array(1e-4))
        mx.eval(parameters, moments)

    from mlx_slm import runtime

    with runtime.sharing_cores(len(lanes)):
        turn.serve(work, 1, mx.get_peak_memory)


RUNNERS = {OURS: run_network, "slm": run_slm, "autodiff": run_autodiff}


def main() -> None:
    options = parse_arguments()
    print_machine()
    base, rows = shape_of(options), []
    tokens = options.rows * options.context
    print(
        f"{base.num_parameters:,} parameters an expert, vocabulary {options.vocab_size:,}, {tokens:,} tokens a step "
        f"({options.rows} x {options.context}), {options.groups} groups, all MLPs projected, float32"
    )
    runners = {side: RUNNERS[side] for side in options.sides.split(",")}
    for h in options.h:
        own = argparse.Namespace(**vars(options) | {"h": h})
        shape, _ = network_of(own)
        found = records("projected_step", f"h={h}", play(runners, own, options.rounds), OURS, tokens, "tokens/s")
        show(found, OURS)
        state = 3 * 4 * shape.num_parameters
        print(f"parameters and moments of the network: {state / 2**20:,.0f} MB")
        peaks = {row["peer"] or OURS: row["peak_bytes"] for row in found}
        if "slm" in peaks:
            activations = peaks["slm"] - 3 * 4 * base.num_parameters
            beyond = (peaks[OURS] - 1.1 * state - activations) / 2**20
            print(f"the network's peak less 1.1 times that and less the SLM step's activations: {beyond:,.0f} MB")
        rows += found
    write(options.json, rows)


if __name__ == "__main__":
    main()

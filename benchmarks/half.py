"""Gradients in bf16, as a GPU computes them, against fp32 on the same device; and a training in each.

    python -m benchmarks.half [--json FILE]

The text is the words of the standard library's sources. On a CPU the forms for a GPU are taken ($MLX_SLM_AS_GPU). A CPU
adds up bf16 in bf16, which a GPU need not do: what is measured here is an upper bound for those sums.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import sysconfig
from pathlib import Path

VOCABULARY = 1024


def words_of_sources(files: int = 60):
    """Ids of the words and signs of this many files of the standard library, int32; 0 for a rare one."""
    import numpy as np

    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:files]
    words = [word for file in sources for word in re.findall(r"\w+|[^\w\s]", file.read_text(errors="replace"))]
    known = {word: i for i, (word, _) in enumerate(collections.Counter(words).most_common(VOCABULARY - 1), 1)}
    return np.array([known.get(word, 0) for word in words], np.int32)


def rows_of(ids, rows: int, context: int, step: int):
    """(tokens int32 [rows, context + 1], weights) of a step."""
    import numpy as np

    starts = np.random.default_rng(step).integers(0, len(ids) - context - 1, rows)
    return np.stack([ids[a : a + context + 1] for a in starts]), np.ones((rows, context), np.float32)


def as_gpu(on: bool) -> None:
    os.environ["MLX_SLM_AS_GPU"] = "1" if on else "0"


def gradients(shape, parameters: dict, tokens, weights, half: bool) -> dict:
    """Gradients of the summed loss by name, float64, computed in bf16 or in fp32."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten

    from mlx_slm.models.transformer import Transformer
    from mlx_slm.training.optimizer import AdamW
    from mlx_slm.training.step import TrainingStep

    as_gpu(half)
    step = TrainingStep(Transformer(shape), AdamW(), len(tokens), parameters)
    step.dtype = mx.bfloat16 if half else mx.float32
    _, found = step._loss_and_gradients(parameters, mx.array(tokens), mx.array(weights))
    as_gpu(False)
    return {name: np.array(value.astype(mx.float32), np.float64) for name, value in tree_flatten(found)}


def errors(half: dict, full: dict, tokens) -> dict:
    """`{"whole", "row", "worst", "tensor"}`: relative L2 errors of the whole gradient, of the row of the most frequent
    token in the embeddings, and of the worst tensor."""
    import numpy as np

    apart = {name: np.linalg.norm(half[name] - full[name]) for name in full}
    sizes = {name: np.linalg.norm(full[name]) for name in full}
    whole = np.linalg.norm(list(apart.values())) / np.linalg.norm(list(sizes.values()))
    table = next(name for name in full if name.endswith(("embed_tokens.weight", "wte.weight")))
    row = np.bincount(tokens[:, :-1].ravel()).argmax()
    of_row = np.linalg.norm(half[table][row] - full[table][row]) / np.linalg.norm(full[table][row])
    worst = max(full, key=lambda name: apart[name] / sizes[name])
    return {"whole": whole, "row": of_row, "worst": apart[worst] / sizes[worst], "tensor": worst}


def head_error(shape, parameters: dict, tokens) -> float:
    """Relative L2 error of the gradient of the head alone, in bf16, from the hidden states of a trained model."""
    import mlx.core as mx
    import numpy as np

    from mlx_slm.models.transformer import Transformer
    from mlx_slm.training.loss import linear_cross_entropy

    model = Transformer(shape)
    model.update(parameters)
    hidden = model(mx.array(tokens[:, :-1])).reshape(-1, shape.dims).astype(mx.bfloat16)
    targets = mx.array(tokens[:, 1:].reshape(-1))
    gradient = mx.grad(lambda head, h: linear_cross_entropy(h, head, targets, mx.ones(len(h))))
    exact_head = model.head.astype(mx.bfloat16).astype(mx.float32)  # both begin with the same rounded numbers
    full = np.array(gradient(exact_head, hidden.astype(mx.float32)), np.float64)
    as_gpu(True)
    half = np.array(gradient(exact_head, hidden), np.float64)
    as_gpu(False)
    return float(np.linalg.norm(half - full) / np.linalg.norm(full))


def trained(shape, ids, steps: int, rows: int, half: bool = False, rate: float = 1e-3, watch=None):
    """(parameters, mean loss of the last tenth of the steps); `watch(step, parameters, batch)` comes before each."""
    import mlx.core as mx

    from mlx_slm.models.transformer import Transformer, initialise
    from mlx_slm.training.optimizer import AdamW
    from mlx_slm.training.step import TrainingStep

    as_gpu(half)
    step = TrainingStep(Transformer(shape), AdamW(), rows, initialise(shape, 0))
    step.dtype, losses = mx.bfloat16 if half else mx.float32, []
    for number in range(steps):
        batch = rows_of(ids, rows, shape.context_length, number)
        if watch:
            watch(number, step.parameters, batch)
        loss, *_ = step(*batch, rate)
        losses.append(loss.item() / batch[1].size)
    as_gpu(False)
    last = losses[-max(1, steps // 10) :]
    return step.parameters, sum(last) / len(last)


def shape_of(family: str, layers: int, dims: int, context: int):
    from mlx_slm.config.schema import ModelConfig
    from mlx_slm.models.shape import Shape

    return Shape.of(ModelConfig(family=family, num_layers=layers, dims=dims, num_heads=4), VOCABULARY, context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()
    import mlx_slm  # noqa: F401
    from benchmarks.run import print_machine, write

    print_machine()
    ids, records = words_of_sources(), []
    for family in ("gpt2", "llama"):
        shape = shape_of(family, 2, 64, 64)

        def watch(number, parameters, batch, family=family, shape=shape):
            if number not in (0, 40, 200):
                return
            half, full = (gradients(shape, parameters, *batch, half) for half in (True, False))
            found = errors(half, full, batch[0]) | {"head": head_error(shape, parameters, batch[0])}
            records.append({"family": family, "steps": number} | found)
            shares = ", ".join(f"{name} {found[name]:.2%}" for name in ("whole", "row", "head", "worst"))
            print(f"{family}, {number} steps: {shares} ({found['tensor']})", flush=True)

        trained(shape, ids, 201, 128, watch=watch)
        small = shape_of(family, 1, 48, 32)
        full, half = (trained(small, ids, 300, 16, half, 5e-4)[1] for half in (False, True))
        records.append({"family": family, "steps": 300, "loss_fp32": full, "loss_bf16": half})
        print(f"{family}, trained for 300 steps: loss {full:.4f} in fp32, {half:.4f} in bf16 ({half / full - 1:+.2%})")
    write(options.json, records)


if __name__ == "__main__":
    main()

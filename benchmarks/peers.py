"""What a user would take instead, on the same work: mlx-lm, PyTorch, sentence-transformers, scikit-learn, faiss,
sentencepiece; and our own simpler forms. A peer whose package is missing is left out.

A peer gives a `Case`, or a function that serves the turns itself. On a GPU mlx-lm trains in bf16 and PyTorch
in bf16 with fp32 masters (autocast), on a CPU both in fp32.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

from benchmarks.case import Case, batch, mlx_peak, no_memory
from benchmarks.sizes import Size

RATE = 1e-4


def mlx_lm_trainer(rows: int, size: Size) -> Callable:
    """Training steps of mlx-lm's own trainer; its loop calls back, so it serves its turns itself."""

    def serve(turn) -> None:
        import mlx.optimizers as optim
        from mlx_lm.tuner import trainer
        from mlx_lm.utils import _get_classes

        from mlx_slm.export.model import huggingface_config
        from mlx_slm.machine import runtime

        class Turns(trainer.TrainingCallback):
            def on_train_loss_report(self, info):
                turn.report(1 / info["iterations_per_second"], mlx_peak())
                if not turn.wait():
                    os._exit(0)

        config = huggingface_config(size.shape, 0)
        model_class, arguments_class = _get_classes(config)
        model = model_class(arguments_class.from_dict(config))
        model.set_dtype(runtime.compute_dtype())
        tokens, _ = batch(size, rows)
        arguments = trainer.TrainingArgs(
            batch_size=rows,
            iters=10**6,
            steps_per_report=1,
            steps_per_save=10**9,
            max_seq_length=size.context + 1,
            adapter_file=os.devnull,
        )
        turn.ready(facts_of(Case(no_memory, rows * size.context, "tokens/s")))
        if turn.wait():
            sys.stdout = open(os.devnull, "w")
            data = [(row.tolist(), 0) for row in tokens]
            trainer.train(
                model, optim.Adam(RATE, bias_correction=True), data, None, arguments, training_callback=Turns()
            )

    return serve


def torch_step(rows: int, size: Size, compiled: bool = False) -> Case:
    """Forward, backward, clipping and AdamW in PyTorch, on transformers' model of the same configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mlx_slm.export.model import huggingface_config

    device = torch_device()
    torch.manual_seed(0)
    config = huggingface_config(size.shape, 0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, use_cache=False)).to(device)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    tokens = torch.tensor(batch(size, rows)[0], dtype=torch.long, device=device)

    def work():
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            logits = run(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        loss.item()

    return Case(work, rows * size.context, "tokens/s", memory=no_memory)


def torch_device() -> str:
    """Where PyTorch computes: on the GPU if MLX does and PyTorch can, else on the CPU; the record then names that."""
    import mlx.core as mx
    import torch

    if mx.default_device() != mx.Device(mx.cpu):
        if torch.cuda.is_available():
            return "cuda"
        if torch.backends.mps.is_available():
            return "mps"
    on_cpu()
    return "cpu"


def on_cpu() -> None:
    """For a peer that knows no other device: its record then names the CPU."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)


def plain_slm(size: Size) -> Case:
    """A step of the plain model on as many rows as the projected network's."""
    from benchmarks.whole import training

    return training(size, size.pn_rows)


def autodiff(size: Size) -> Case:
    """The gradient with respect to E, M and T, and one update of them all: what the factored step replaces."""
    import mlx.core as mx
    import numpy as np

    from benchmarks.whole import network_of
    from mlx_slm.machine import runtime
    from mlx_slm.models.projected import initialise_network, stacked
    from mlx_slm.models.transformer import Transformer
    from mlx_slm.training.loss import next_token_loss
    from mlx_slm.training.optimizer import AdamW
    from mlx_slm.training.step import add_trees, compiled_lanes, shared_out

    shape, config = network_of(size)
    model, optimizer = Transformer(shape.base), AdamW()
    parameters = initialise_network(shape, config, 0)
    state = [parameters, optimizer.init(parameters)]
    tokens, weights = batch(size, size.pn_rows)
    clusters, per_group = np.arange(size.groups) % size.h, size.pn_rows // size.groups

    def gradients(parameters, tokens, weights, ids):
        def loss(parameters):
            model.update(stacked(parameters, ids))
            return next_token_loss(model, tokens, weights)

        return mx.value_and_grad(loss)(parameters)

    lanes, update = compiled_lanes(gradients, size.groups), mx.compile(optimizer.update)

    def work():
        parameters, moments = state
        total = found = None
        for part, stream, compute in shared_out(np.arange(size.groups), lanes):
            rows = slice(part[0] * per_group, (part[-1] + 1) * per_group)
            with mx.stream(stream):
                loss, one = compute(parameters, *map(mx.array, (tokens[rows], weights[rows], clusters[part])))
            total, found = (loss, one) if total is None else (total + loss, add_trees(found, one))
        count = mx.array(float(weights.sum()))
        with runtime.sharing_cores(len(lanes)):
            parameters, moments, _ = update(parameters, moments, found, count, total, mx.array(RATE))
            mx.eval(parameters, moments)
        state[:] = parameters, moments

    return Case(work, weights.size, "tokens/s")


def faiss_kmeans(size: Size) -> Case:
    import faiss

    from benchmarks.texts import ITERATIONS, points_and_start

    on_cpu()
    points, start = points_and_start(size)

    def work():
        made = faiss.Clustering(points.shape[1], size.clusters)
        made.niter, made.max_points_per_centroid = ITERATIONS, len(points)
        made.min_points_per_centroid = 1
        faiss.copy_array_to_vector(start.ravel(), made.centroids)
        made.train(points, faiss.IndexFlatL2(points.shape[1]))

    return Case(work, len(points) * ITERATIONS, "points/s", memory=no_memory)


def sklearn_kmeans(size: Size) -> Case:
    from sklearn.cluster import KMeans

    from benchmarks.texts import ITERATIONS, points_and_start

    on_cpu()
    points, start = points_and_start(size)
    work = lambda: KMeans(size.clusters, init=start, n_init=1, max_iter=ITERATIONS, tol=0).fit(points)  # noqa: E731
    return Case(work, len(points) * ITERATIONS, "points/s", memory=no_memory)


def products(size: Size) -> Case:
    """The floor: the products of points and centroids alone, as many as there are iterations."""
    import mlx.core as mx

    from benchmarks.texts import ITERATIONS, points_and_start

    points, start = (mx.array(values) for values in points_and_start(size))
    turned = mx.contiguous(start.T)
    mx.eval(points, turned)

    def work():
        for _ in range(ITERATIONS):
            mx.eval(points @ turned)

    return Case(work, len(points) * ITERATIONS, "points/s")


def sentence_transformers(size: Size) -> Case:
    from sentence_transformers import SentenceTransformer

    from benchmarks.texts import hundred_words
    from mlx_slm.config.schema import DEFAULT_ENCODER
    from mlx_slm.embedding.encoder import find_directory

    model = SentenceTransformer(str(find_directory(DEFAULT_ENCODER)), device=torch_device())
    texts = hundred_words(size.texts)
    return Case(lambda: model.encode(texts, show_progress_bar=False), len(texts), "texts/s", memory=no_memory)


def bare_sentencepiece(size: Size) -> Case:
    """The ids alone, in Python's lists."""
    import tempfile
    from pathlib import Path

    import sentencepiece

    from benchmarks.texts import documents_of, tokenizer_in
    from mlx_slm.text.tokenizer import MODEL_FILE

    on_cpu()
    with tempfile.TemporaryDirectory() as directory:
        made = tokenizer_in(Path(directory), size).directory / MODEL_FILE
        model = sentencepiece.SentencePieceProcessor(model_file=str(made))
    texts = documents_of(size)
    amount = sum(len(text.encode()) for text in texts)
    work = lambda: model.encode(texts, out_type=int, num_threads=1)  # noqa: E731
    return Case(work, amount, "bytes/s", memory=no_memory)


STOCK = "mlx-lm as installed"
"""In the environment that the benchmark was started in, without our BLAS, allocator and compiler: a step takes most of
a minute on a Linux CPU."""


OWN_BLAS = frozenset({"torch", "torch, compiled", "faiss", "scikit-learn", "sentence-transformers", "sentencepiece"})
"""They bring a BLAS of their own; with OpenBLAS in front of it PyTorch is five times slower (two thread pools)."""


def steps(rows: Callable[[Size], int]) -> dict[str, Callable]:
    found: dict[str, Callable] = {
        "mlx-lm": lambda size: mlx_lm_trainer(rows(size), size),
        "torch": lambda size: torch_step(rows(size), size),
        "torch, compiled": lambda size: torch_step(rows(size), size, compiled=True),
    }
    if sys.platform == "linux":
        found[STOCK] = found["mlx-lm"]
    return found


PEERS: dict[str, dict[str, Callable]] = {
    "slm_step": steps(lambda size: size.rows),
    "finetuning_step": {name: peer for name, peer in steps(lambda size: min(8, size.rows)).items() if name != STOCK},
    "pn_step": {"slm": plain_slm, "autodiff": autodiff},
    "kmeans": {"faiss": faiss_kmeans, "scikit-learn": sklearn_kmeans, "bare products": products},
    "encoder": {"sentence-transformers": sentence_transformers},
    "tokenising": {"sentencepiece": bare_sentencepiece},
}


def facts_of(case: Case) -> dict:
    """What a side says about itself: its work, its device and its dtype."""
    from mlx_slm.machine import runtime

    facts = {key: getattr(case, key) for key in ("amount", "unit", "flops", "bytes", "size")}
    return facts | {"device": runtime.device_name(), "dtype": str(runtime.compute_dtype()).removeprefix("mlx.core.")}


def run_peer(name: str, peer: str, device: str, size: Size, turn) -> None:
    """One peer's side of a benchmark, on the device that ours is on, if it can."""
    import mlx.core as mx

    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
    side = PEERS[name][peer](size)
    if isinstance(side, Case):
        turn.serve(side, facts_of(side))
    else:
        side(turn)


def peers_of(name: str, device: str) -> dict[str, Callable]:
    """The sides of a benchmark's peers."""
    return {peer: functools.partial(run_peer, name, peer, device) for peer in PEERS.get(name, {})}

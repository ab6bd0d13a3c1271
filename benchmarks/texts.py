"""Clustering, encoding and reading of real text: the documentation that comes with Python and with packages."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.case import Case, named, no_memory
from benchmarks.sizes import Size

CACHE = Path.home() / ".cache" / "mlx-slm" / "embeddings-50000.npy"
SHORT = 120
ITERATIONS = 10


def topics_words() -> list[str]:
    """Words of Python's language reference, 0.7 MB."""
    from pydoc_data.topics import topics

    return " ".join(topics.values()).split(" ")


def hundred_words(count: int) -> list[str]:
    """Texts of a hundred words each."""
    words = topics_words()
    return [" ".join(words[100 * i % len(words) :][:100]) for i in range(count)]


def make_embeddings() -> None:
    """Embed 50,000 short real texts (paragraphs of docstrings) once, with the default encoder; tests use them too."""
    import time

    import numpy as np

    from mlx_slm.config.schema import DEFAULT_ENCODER
    from mlx_slm.embedding.bert import SentenceEncoder
    from mlx_slm.embedding.encoder import find_directory
    from mlx_slm.text.docstrings import documents

    if CACHE.exists():
        return
    found: dict[str, None] = {}
    for text in documents("*"):
        found |= {" ".join(part.split())[:SHORT]: None for part in text.split("\n\n") if len(part) > 60}
        if len(found) >= 50_000:
            break
    texts, parts, start = list(found)[:50_000], [], time.perf_counter()
    encoder = SentenceEncoder(find_directory(DEFAULT_ENCODER))
    for first in range(0, len(texts), 2000):
        parts.append(encoder.encode(texts[first : first + 2000]).astype(np.float16))
        rate = (first + len(parts[-1])) / (time.perf_counter() - start)
        print(f"embedding {first + len(parts[-1]):,} of {len(texts):,} texts, {rate:.0f}/s", flush=True)
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    np.save(CACHE, np.concatenate(parts))


def points_and_start(size: Size):
    """(fp32 [points, embedding], the first centroids): embeddings of real texts, random numbers where the size is not
    that of the embeddings."""
    import numpy as np

    rng = np.random.default_rng(0)
    if CACHE.exists() and size.embedding == 384:
        points = np.load(CACHE)[: size.points].astype(np.float32)
    else:
        points = rng.standard_normal((size.points, size.embedding), np.float32)
    return points, points[rng.choice(len(points), size.clusters, replace=False)].copy()


def kmeans(size: Size) -> Case:
    """Ten iterations from given centroids, on embeddings of real texts."""
    from mlx_slm.clustering.kmeans import KMeansState, Lloyd
    from mlx_slm.clustering.kmeans import kmeans as run

    points, start = points_and_start(size)

    def work():
        run(points, size.clusters, Lloyd(iterations=ITERATIONS, tolerance=-1), KMeansState(centroids=start))

    return Case(work, len(points) * ITERATIONS, "points/s", 2 * start.size * len(points) * ITERATIONS)


def encoder(size: Size) -> Case:
    """Sentence embeddings by the default encoder, of texts of a hundred words."""
    from mlx_slm.config.schema import DEFAULT_ENCODER
    from mlx_slm.embedding.bert import SentenceEncoder
    from mlx_slm.embedding.encoder import find_directory

    encode, texts = SentenceEncoder(find_directory(DEFAULT_ENCODER)).encode, hundred_words(size.texts)
    return Case(lambda: encode(texts), len(texts), "texts/s")


def documents_of(size: Size) -> list[str]:
    """Documents of 2,000 words, `text` bytes in all; where there is not enough text, the same again, shuffled."""
    import random

    words, rng = topics_words(), random.Random(0)
    found, total = [], 0
    while total < size.text:
        for i in range(0, len(words) - 2000, 2000):
            found.append(" ".join(words[i : i + 2000]))
            total += len(found[-1])
            if total >= size.text:
                break
        rng.shuffle(words)
    return found


def tokenizer_in(directory: Path, size: Size):
    from mlx_slm.config.schema import TokenizerConfig
    from mlx_slm.text.tokenizer import train_tokenizer

    config = TokenizerConfig(vocab_size=min(4096, max(600, size.vocab_size)))
    return train_tokenizer(directory / "tokenizer", [" ".join(topics_words())], config, {"settings": {}, "text": ""})


def tokenising(size: Size) -> Case:
    """Documents to a file of token ids, one process: what each of `prepare`'s does."""
    from mlx_slm.text.shards import write_shard

    scratch = tempfile.TemporaryDirectory()
    tokenizer, texts = tokenizer_in(Path(scratch.name), size), documents_of(size)
    amount = sum(len(text.encode()) for text in texts)
    work = lambda: write_shard(texts, tokenizer, Path(scratch.name) / "shard.npz")  # noqa: E731
    return Case(work, amount, "bytes/s", memory=no_memory)


def preparing(size: Size) -> Case:
    """`prepare` of a generic set: tokenizer, tokens and windows, all processes, into an empty workspace."""
    import json

    scratch = tempfile.TemporaryDirectory()
    file, texts = Path(scratch.name) / "text.jsonl", documents_of(size)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    amount = sum(len(text.encode()) for text in texts)

    def work() -> None:
        with tempfile.TemporaryDirectory() as workspace:
            command = [sys.executable, "-m", "mlx_slm", "prepare", "generic", str(file), "--workspace", workspace, "-q"]
            pieces = ["--config", "laptop", "--set", f"tokenizer.vocab_size={min(4096, max(600, size.vocab_size))}"]
            subprocess.run([*command, *pieces], check=True, capture_output=True)

    return Case(work, amount, "bytes/s", memory=no_memory, keep=scratch)


def near_duplicates(size: Size) -> Case:
    """All documents of a prepared set compared with each other, one process."""
    from mlx_slm.text.near import near_duplicates
    from mlx_slm.text.shards import merge_shards, write_shard
    from mlx_slm.text.store import Store

    scratch = tempfile.TemporaryDirectory()
    shard, directory = Path(scratch.name) / "train-00000.npz", Path(scratch.name) / "store"
    tokenizer, texts = tokenizer_in(Path(scratch.name), size), documents_of(size)
    write_shard(texts, tokenizer, shard)
    made_from = {"tokenizer": tokenizer.fingerprint, "context_length": size.context}
    merge_shards([shard], directory, tokenizer, made_from, {"replaced": 0})
    store = Store(directory)
    return Case(lambda: near_duplicates([store]), store.num_bytes, "bytes/s", memory=no_memory, keep=scratch)


def make_store(directory: Path, windows: int, context: int, vocab_size: int = 4096) -> None:
    """A store of random tokens: documents of ten windows."""
    import numpy as np

    from mlx_slm.storage.artifacts import new_artifact
    from mlx_slm.text.store import KIND, TOKENS, WINDOW, WINDOWS

    with new_artifact(directory, KIND, {"tokenizer": "none"}, mapped=(TOKENS, WINDOWS)) as (path, info):
        rng = np.random.default_rng(0)
        with open(path / TOKENS, "wb") as tokens_file, open(path / WINDOWS, "wb") as windows_file:
            for first in range(0, windows, 10**6):
                count = min(10**6, windows - first)
                rng.integers(2, vocab_size, count * context, np.uint16).tofile(tokens_file)
                made = np.empty(count, WINDOW)
                made["offset"] = np.arange(first, first + count) * context
                made["length"], made["bytes"] = context, 4 * context
                made["document"] = np.arange(first, first + count) // 10
                made.tofile(windows_file)
        info.update(tokens=windows * context, documents=-(-windows // 10), bytes=4 * windows * context, dtype="<u2")
        info.update(context_length=context, eos_id=1, replaced=0)


def evaluation(size: Size) -> Case:
    """The loss of the small model on 64 whole windows of a store."""
    import numpy as np

    from mlx_slm.models.transformer import Transformer, initialise
    from mlx_slm.text.store import Store
    from mlx_slm.training.scoring import validation_loss

    with tempfile.TemporaryDirectory() as scratch:
        make_store(Path(scratch) / "store", 64, size.context, size.vocab_size)
        store = Store(Path(scratch) / "store")
    loss, parameters = validation_loss(Transformer(size.shape), store, np.arange(64)), initialise(size.shape, 0)
    tokens = 64 * size.context
    return Case(lambda: loss(parameters), tokens, "tokens/s", size.shape.forward_flops_per_token * tokens)


def clustered(store, k: int):
    """(order, ends, bounds) of a random assignment of a store's windows to k clusters."""
    import numpy as np

    from mlx_slm.text.rows import separated_ends

    place = np.random.default_rng(0).integers(0, k, store.num_windows)
    order = np.argsort(place, kind="stable")
    return order, separated_ends(store, order), np.concatenate([[0], np.cumsum(np.bincount(place, minlength=k))])


def row_loading(size: Size) -> Case:
    """The rows of training steps, drawn over clusters from a store on disk."""
    from itertools import count, pairwise

    import numpy as np

    from mlx_slm.text.rows import Sampler, Stream
    from mlx_slm.text.store import Store

    scratch = tempfile.TemporaryDirectory()
    make_store(Path(scratch.name) / "store", size.points, size.context)
    store = Store(Path(scratch.name) / "store")
    order, ends, bounds = clustered(store, size.clusters)
    streams = [Stream(store, order, ends, int(a), int(b)) for a, b in pairwise(bounds)]
    sampler, steps = Sampler(streams, np.ones(len(streams)), size.rows, 0), count()
    amount = 20 * size.rows * size.context
    work = lambda: [sampler.rows(next(steps)) for _ in range(20)]  # noqa: E731
    return Case(work, amount, "tokens/s", memory=no_memory, keep=scratch)


OPENING = """
import resource, sys, time
import numpy as np
from mlx_slm.text.rows import Sampler, Stream
from mlx_slm.text.store import Store
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
store = Store(sys.argv[1])
Sampler([Stream(store)], np.ones(1), 16, 0).rows(0)
seconds = time.perf_counter() - start
unit = 1 if sys.platform == "darwin" else 1024
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
"""


def opening(size: Size) -> Case:
    """A store of so many windows, opened by a fresh process, and its first batch: seconds, and memory that it takes."""
    scratch = tempfile.TemporaryDirectory()
    path = Path(scratch.name) / "store"
    make = f"from benchmarks.texts import *; make_store(Path({str(path)!r}), {size.windows}, 16)"
    subprocess.run([sys.executable, "-c", make], check=True)
    grown: list[int] = []

    def work() -> float:
        done = subprocess.run(
            [sys.executable, "-c", OPENING, Path(scratch.name) / "store"], check=True, capture_output=True, text=True
        )
        seconds, memory = done.stdout.split()
        grown.append(int(memory))
        return float(seconds)

    return Case(work, size.windows, "windows/s", memory=lambda: max(grown, default=None), timed=True)


def help(size: Size) -> Case:
    """`mlx-slm --help`, from start to end."""
    command = [sys.executable, "-m", "mlx_slm", "--help"]
    return Case(lambda: subprocess.run(command, check=True, capture_output=True), 1, "starts/s", memory=no_memory)


TEXTS = named(evaluation, kmeans, encoder, tokenising, preparing, near_duplicates, row_loading, opening, help)

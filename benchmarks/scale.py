"""What a training of many ranks and a pool of many windows cost, in their parts (docs/scale.md).

    python -m benchmarks.scale ring                      two ranks on this machine: latency and bandwidth of all_sum
    python -m benchmarks.scale data WORKSPACE            tokenising, and embedding with each encoder
    python -m benchmarks.scale clusters WORKSPACE        flat k-means and trees on its embeddings
    python -m benchmarks.scale pool WORKSPACE            `cluster` of up to 10^7 windows: time and memory

Prints a JSON line for each measurement, as docs/records keeps them.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

import mlx_slm  # noqa: F401  (before mlx: the BLAS)
from mlx_slm.clustering.clusters import ensure_clusters
from mlx_slm.clustering.kmeans import Lloyd, kmeans
from mlx_slm.clustering.learn import split_points
from mlx_slm.clustering.tree import assign
from mlx_slm.config.files import load_config
from mlx_slm.config.schema import DEFAULT_ENCODER
from mlx_slm.embedding.embed import FILE, KIND, Embeddings
from mlx_slm.embedding.encoder import choose_encoder, window_texts
from mlx_slm.files import append_array
from mlx_slm.machine import runtime
from mlx_slm.project import Project
from mlx_slm.report import Report
from mlx_slm.storage.artifacts import new_artifact
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.documents import Documents
from mlx_slm.text.hub_tokenizer import open_tokenizer
from mlx_slm.text.sources import Source
from mlx_slm.text.store import KIND as STORE
from mlx_slm.text.store import TOKENS, WINDOWS, Store
from mlx_slm.text.workspace_tokenizer import reading_of

SIZES = [1, 256, 2**14, 2**18, 2**20, 2**23, 2**25]
"""fp32 numbers that are summed."""
RANK = f"""
import json, time
import mlx.core as mx
from statistics import median
group = mx.distributed.init(backend="ring", strict=True)
for size in {SIZES}:
    seconds = []
    for _ in range(9 if size > 2**20 else 101):
        array = mx.zeros(size) + 1
        mx.eval(array)
        begun = time.perf_counter()
        mx.eval(mx.distributed.all_sum(array, group=group))
        seconds.append(time.perf_counter() - begun)
    if group.rank() == 0:
        print(json.dumps({{"what": "all_sum", "bytes": 4 * size, "seconds": median(seconds)}}), flush=True)
"""


@click.group()
def cli() -> None:
    pass


@cli.command()
@click.option("--port", default=23456)
def ring(port: int) -> None:
    """Two ranks on this machine, over its loopback."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(2)]))
        environment = os.environ | {"MLX_HOSTFILE": str(hosts), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([sys.executable, "-c", RANK], env=environment | {"MLX_RANK": str(rank)})
            for rank in range(2)
        ]
        sys.exit(max(rank.wait() for rank in ranks))


def note(**facts) -> None:
    click.echo(json.dumps({"device": runtime.device_name()} | facts))


@cli.command()
@click.argument("workspace", type=click.Path(exists=True, path_type=Path))
@click.option("--set", "name", default="generic")
def clusters(workspace: Path, name: str) -> None:
    """Learn 1,024 and 4,096 clusters of windows, flat and as trees."""
    (folder,) = (workspace / "embeddings").glob(f"*/{name}/train")
    embeddings = Embeddings(folder)
    held = embeddings.sample(20_000, np.random.default_rng(1))
    for branches in ([1024], [32, 32], [4096], [64, 64], [16, 16, 16]):
        k = int(np.prod(branches))
        points = embeddings.sample(64 * k, np.random.default_rng(0))
        begun = time.perf_counter()
        levels = learn(points, branches)
        seconds = time.perf_counter() - begun
        distances = [float(next(assign(iter([rows]), levels))[1].mean()) for rows in (points, held)]
        facts = {"tree": branches, "points": len(points), "dims": embeddings.dims, "seconds": round(seconds, 2)}
        note(what="learn", **facts, distance=round(distances[0], 5), distance_held=round(distances[1], 5))


@cli.command()
@click.argument("workspace", type=click.Path(exists=True, path_type=Path))
def pool(workspace: Path) -> None:
    """`cluster` of pools that repeat the windows and embeddings of a real set, each in a process of its own."""
    with tempfile.TemporaryDirectory(dir=workspace.parent) as folder:
        for count in (10**5, 10**6, 10**7):
            target = Path(folder) / str(count)
            repeat(Workspace(workspace), Workspace(target), count)
            for tree in ("1024", "32,32", "64,64", "16,16,16", "256,256"):
                subprocess.run([sys.executable, "-m", "benchmarks.scale", "one", str(target), tree], check=True)
                shutil.rmtree(target / "clusters")
            shutil.rmtree(target)


class Timed(Report):
    """Notes the seconds of each task by the first word of its title."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def progress(self, title: str, total: float | None, unit: str) -> Iterator[Callable[..., None]]:
        begun = time.perf_counter()
        yield lambda amount, total=None: None
        word = title.split()[0].rstrip(",")
        self.seconds[word] = self.seconds.get(word, 0.0) + time.perf_counter() - begun


@cli.command(hidden=True)
@click.argument("workspace", type=click.Path(exists=True, path_type=Path))
@click.argument("tree")
def one(workspace: Path, tree: str) -> None:
    """One tree of a pool, or flat clusters."""
    place, branches = Workspace(workspace), [int(width) for width in tree.split(",")]
    config, report = load_config(place.config_file), Timed()
    clusters = config.clusters.model_copy(update={"tree": branches if len(branches) > 1 else []})
    project = Project(place, config, report).having(clusters=clusters)
    before, begun = rss(), time.perf_counter()
    ensure_clusters(project, [math.prod(branches)], [], splits=("train",))
    seconds = time.perf_counter() - begun
    count = Store(place.data(config.data.generic, "train")).num_windows
    parts = {f"seconds_{word}": round(value, 2) for word, value in report.seconds.items()}
    memory = {"rss_mb": rss(), "rss_before_mb": before}
    note(what="pool", tree=branches, windows=count, seconds=round(seconds, 2), **parts, **memory)


def repeat(source: Workspace, target: Workspace, count: int) -> None:
    """A workspace whose generic set has so many windows: those of another, with their embeddings, again and again."""
    config = load_config(source.config_file)
    generic = config.data.generic
    target.root.mkdir()
    shutil.copy(source.config_file, target.config_file)
    shutil.copytree(source.tokenizer, target.tokenizer)
    for split in ("valid", "test"):
        shutil.copytree(source.data(generic, split), target.data(generic, split))
    store = Store(source.data(generic, "train"))
    every, inputs = np.resize(store.windows[:], count), store.manifest["inputs"]
    with new_artifact(target.data(generic, "train"), STORE, inputs, mapped=(TOKENS, WINDOWS)) as (directory, info):
        shutil.copy(store.directory / TOKENS, directory / TOKENS)
        every.tofile(directory / WINDOWS)
        info.update(store.manifest["info"])
    store, tokenizer = Store(target.data(generic, "train")), open_tokenizer(target.tokenizer)
    (folder,) = (source.root / "embeddings").glob(f"*/{generic}/train")
    embeddings = Embeddings(folder)
    choice = choose_encoder(target, config.clusters, store, tokenizer, Report())
    path, inputs = target.embeddings(choice.key, generic, "train"), {"store": store.fingerprint, **choice.facts}
    with new_artifact(path, KIND, inputs, mapped=(FILE,)) as (directory, info):
        with open(directory / FILE, "wb") as file:
            for rows in windows(embeddings, count):
                append_array(file, rows.astype(np.float16))
        info.update(windows=count, dims=embeddings.dims)


@cli.command()
@click.argument("workspace", type=click.Path(exists=True, path_type=Path))
@click.option("--set", "name", default="generic")
def data(workspace: Path, name: str) -> None:
    """Text to tokens, windows to embeddings: rates on the first windows of a prepared set."""
    place = Workspace(workspace)
    store, tokenizer = Store(place.data(name, "train")), open_tokenizer(place.tokenizer)
    texts = window_texts(store, tokenizer, np.arange(20_000))
    size = sum(len(text.encode()) for text in texts)
    begun = time.perf_counter()
    tokens = sum(len(ids) for ids in map(tokenizer.encode, texts))
    seconds = time.perf_counter() - begun
    config = load_config(place.config_file)
    documents = Documents(
        [Source.parse(source) for source in store.manifest["inputs"]["sources"]],
        config,
        reading_of(config, False, place.root),
    )
    begun = time.perf_counter()
    for _ in documents:
        pass
    note(what="read", bytes=documents.counts.bytes, seconds=round(time.perf_counter() - begun, 2), processes=1)
    note(what="tokenise", bytes=size, tokens=tokens, seconds=round(seconds, 2), processes=1)
    for encoder, count in (("lsi", 20_000), ("static", 20_000), (DEFAULT_ENCODER, 512)):
        settings = config.clusters.model_copy(update={"encoder": encoder})
        opened = choose_encoder(place, settings, store, tokenizer, Report()).open()
        opened.encode(texts[:64])
        begun = time.perf_counter()
        vectors = opened.encode(texts[:count])
        seconds = time.perf_counter() - begun
        size = sum(len(text.encode()) for text in texts[:count])
        facts = {"encoder": encoder, "windows": count, "bytes": size, "dims": vectors.shape[1]}
        note(what="embed", **facts, seconds=round(seconds, 2))


def learn(points: np.ndarray, branches: list[int]) -> list[np.ndarray]:
    """The centroids of each level of a tree, all from these points."""
    levels: list[np.ndarray] = []
    for width in branches:
        if not levels:
            levels.append(kmeans(points, width, Lloyd(0, 50))[0])
            continue
        places = next(assign(iter([points]), levels))[0]
        above = enumerate(levels[-1])
        parts = [split_points(points[places == parent], center, width, Lloyd(0, 50))[0] for parent, center in above]
        levels.append(np.concatenate(parts))
    return levels


def windows(embeddings: Embeddings, count: int) -> Iterator[np.ndarray]:
    """So many embeddings: those of a real set, again and again."""
    given = 0
    while given < count:
        for chunk in embeddings.chunks():
            yield chunk[: count - given]
            given += len(chunk)
            if given >= count:
                return


def rss() -> int:
    """MB that this process has taken at most, with what is mapped of files."""
    status = Path("/proc/self/status")
    if status.exists():  # what `getrusage` says begins with what the parent took
        return int(status.read_text().split("VmHWM:")[1].split()[0]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20


if __name__ == "__main__":
    cli()

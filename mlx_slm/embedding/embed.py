"""Windows -> embeddings: `embeddings/<encoder>/<set>/<split>`, fp16, in shards, so that a killed run goes on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlx_slm.embedding.encoder import Choice, window_texts
from mlx_slm.errors import Interrupted, SlmError
from mlx_slm.files import append_array
from mlx_slm.machine.ranks import ranks
from mlx_slm.report import Report, duration
from mlx_slm.storage.artifacts import is_made, load_manifest, new_artifact
from mlx_slm.storage.mapped import MappedFile
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.hub_tokenizer import open_tokenizer
from mlx_slm.text.shards import read_or_remove, save_shard, start_shards
from mlx_slm.text.store import Store

KIND = "embeddings"
FILE = "embeddings.f16"
UNKNOWN = 0.1
"""The share of unknown word pieces from which a user should know."""
READ = 16_384
"""Windows that are read at once."""


class Embeddings:
    """Embeddings of one split, fp16 [windows, dims], memory-mapped."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.manifest = load_manifest(self.directory, KIND)
        self.dims = self.manifest["info"]["dims"]
        self._values = MappedFile(self.directory / FILE, "<f2", self.manifest["files"][FILE])

    def __len__(self) -> int:
        return len(self._values) // self.dims

    def rows(self, start: int, stop: int) -> np.ndarray:
        """fp32 [stop - start, dims]."""
        return self._values.read(start * self.dims, stop * self.dims).reshape(-1, self.dims).astype(np.float32)

    def at(self, windows: np.ndarray) -> np.ndarray:
        """Rows of some windows, fp32 [len(windows), dims], in their order."""
        return self._values.read_each(np.asarray(windows, np.int64) * self.dims, self.dims).astype(np.float32)

    def chunks(self) -> Iterator[np.ndarray]:
        """All rows in order, fp32, a few thousand at a time."""
        for start in range(0, len(self), READ):
            yield self.rows(start, min(start + READ, len(self)))

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Rows of a random subset in the order of the store, fp32 [count, dims]."""
        if count >= len(self):
            return np.concatenate(list(self.chunks()))
        chosen = np.sort(rng.permutation(len(self))[:count])
        parts = []
        for start in range(0, len(self), READ):
            first, last = np.searchsorted(chosen, (start, start + READ))
            parts.append(self.rows(start, min(start + READ, len(self)))[chosen[first:last] - start])
        return np.concatenate(parts)


def embed(workspace: Workspace, name: str, split: str, choice: Choice, report: Report) -> Embeddings:
    """Return the embeddings of a split by an encoder, computing them where they are missing or the text changed."""
    store = Store(workspace.data(name, split))
    path, together = workspace.embeddings(choice.key, name, split), ranks()
    inputs = {"store": store.fingerprint, **choice.facts}
    if together.agree(is_made(path, KIND, inputs)):
        return Embeddings(path)
    partial = path.with_name(f".{split}.partial")
    together.in_turn(lambda: start_shards(partial, inputs, report))
    encoder, tokenizer = together.in_turn(choice.open), open_tokenizer(workspace.tokenizer)
    size, total, made = encoder.shard_windows, store.num_windows, 0
    shards = [partial / f"{start:010d}.npz" for start in range(0, total, size)]
    with report.progress(f"embedding {name}/{split}", total, " windows") as advance:
        advance(min(total, size * sum(shard.exists() for shard in shards)))

        def make(shard: int) -> None:
            nonlocal made
            windows = np.arange(shard * size, min((shard + 1) * size, total))
            if not made and (share := encoder.unknown(window_texts(store, tokenizer, windows[:200]))) > UNKNOWN:
                report.warn(
                    f"the encoder {choice.facts['encoder']} does not know {share:.0%} of the pieces of {name}: "
                    "take one for its language with clusters.encoder, or lsi, which learns from the generic set"
                )
            begun = time.perf_counter()
            vectors = encoder.encode(window_texts(store, tokenizer, windows)).astype(np.float16)
            _require_finite(vectors, shard * size, store)
            save_shard(shards[shard], embeddings=vectors)
            made += 1
            if made == 1:
                rate = len(windows) * together.size / (time.perf_counter() - begun)
                _announce(name, total - shard * size - len(windows), rate, report)
            advance(len(windows) * together.size)

        together.share_out(len(shards), lambda shard: shards[shard].exists(), make)

    def join() -> None:
        if not is_made(path, KIND, inputs):
            with new_artifact(path, KIND, inputs, mapped=(FILE,)) as (directory, info):
                with open(directory / FILE, "wb") as file:
                    for shard in shards:
                        append_array(file, read_or_remove(shard, "embeddings")[0])
                info.update(windows=total, dims=encoder.dims)
        shutil.rmtree(partial, ignore_errors=True)

    together.in_turn(join)
    return Embeddings(path)


def _require_finite(vectors: np.ndarray, start: int, store: Store) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise SlmError(
            f"the encoder gave window {start + bad[0]:,} of {store.directory} an embedding that is not finite "
            f"({len(bad)} of {len(vectors)} there): choose another one with clusters.encoder"
        )


def _announce(name: str, windows: int, rate: float, report: Report) -> None:
    if windows / rate > 600:
        report.line(
            f"embedding the other {windows:,} windows of {name} takes about {duration(windows / rate)} on this machine "
            f"({rate:.0f} windows/s); clusters.encoder=static or lsi does thousands a second"
        )
        if not report.confirm("go on?"):
            raise Interrupted("not started; the first shard is kept")

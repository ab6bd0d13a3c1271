"""Documents -> shards -> stores: tokenised by parallel processes, about 4 MB of text at a time.

Each finished shard is a file of its own, so a run that was killed tokenises only what is missing. Of several ranks each
reads all documents and tokenises every N-th shard.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from mlx_slm.files import Damaged, append_array, open_regular, read_json
from mlx_slm.machine import runtime
from mlx_slm.machine.ranks import ranks
from mlx_slm.report import Report
from mlx_slm.storage.artifacts import new_artifact
from mlx_slm.storage.records import write_json
from mlx_slm.text.documents import Documents
from mlx_slm.text.hub_tokenizer import open_tokenizer
from mlx_slm.text.sources import SPLITS
from mlx_slm.text.store import KIND, TOKENS, WINDOWS, cut_windows
from mlx_slm.text.tokenizer import Tokenizer

SHARD_BYTES = 4 << 20


def start_shards(partial: Path, plan: dict, report: Report) -> None:
    """Keep the shards of an interrupted run if they are of the same text, tokenizer and settings; else start over."""
    record, before = partial / "plan.json", None
    with contextlib.suppress(Damaged):
        before = read_json(record)
    if before == plan:
        done = len(list(partial.glob("*.npz")))
        if done:
            report.line(f"resuming: {done} finished shards are kept")
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(record, plan)


def tokenise(
    documents: Documents, tokenizer: Tokenizer, partial: Path, report: Report, title: str
) -> dict[str, list[Path]]:
    """Write shards of about 4 MB of text per split, those missing, in parallel; returns their paths in order.

    Of several ranks each writes its own, and then, where their files are not shared, all that are still missing.
    """
    together = ranks()
    shards = _write_shards(documents, tokenizer, partial, report, title, lambda n: n % together.size == together.rank)
    together.of_all(None)
    if not all(path.exists() for split in SPLITS for path in shards[split]):
        shards = _write_shards(documents.again(), tokenizer, partial, report, title, lambda n: True)
    together.of_all(None)
    return shards


def _write_shards(
    documents: Documents, tokenizer: Tokenizer, partial: Path, report: Report, title: str, own: Callable[[int], bool]
) -> dict[str, list[Path]]:
    """Those whose number in the order of all of them is this process's own; returns the paths of all."""
    shards: dict[str, list[Path]] = {split: [] for split in SPLITS}
    buffers: dict[str, list[str]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    workers = max(1, runtime.cores() // ranks().here)
    pending: dict[Future, int] = {}
    pool = None

    def close(split: str, last: bool) -> None:
        nonlocal pool
        texts, size = buffers[split], sizes[split]
        path = partial / f"{split}-{len(shards[split]):05d}.npz"
        mine = own(sum(map(len, shards.values())))
        shards[split].append(path)
        buffers[split], sizes[split] = [], 0
        if not mine or (path.exists() and _is_whole(path)):
            done(size)
        elif last and pool is None:
            write_shard(texts, tokenizer, path)
            done(size)
        else:
            pool = pool or ProcessPoolExecutor(
                workers,
                mp_context=get_context("spawn"),
                initializer=_start_worker,
                initargs=(tokenizer.directory, os.getpid()),
            )
            pending[pool.submit(_write_shard_in_worker, texts, path)] = size
            drain(workers + 2)

    def drain(most: int) -> None:
        while len(pending) > most:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                future.result()
                done(pending.pop(future))

    try:
        with report.progress(title, None, "B") as advance:

            def done(size: int) -> None:
                advance(size, documents.expected_bytes())

            for _, text, split in documents:
                buffers[split].append(text)
                sizes[split] += len(text.encode())
                if sizes[split] >= SHARD_BYTES:
                    close(split, last=False)
            for split in SPLITS:
                if buffers[split]:
                    close(split, last=True)
            drain(0)
    finally:
        if pool:
            pool.shutdown(wait=True, cancel_futures=True)
    return shards


_worker_tokenizer: Tokenizer | None = None


def _start_worker(directory: Path, parent: int) -> None:
    import signal

    global _worker_tokenizer
    runtime.end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker_tokenizer = open_tokenizer(directory)


def _write_shard_in_worker(texts: list[str], path: Path) -> None:
    assert _worker_tokenizer is not None
    write_shard(texts, _worker_tokenizer, path)


def write_shard(texts: list[str], tokenizer: Tokenizer, path: Path) -> None:
    """Tokenise documents into one file: `tokens`, `lengths` (of each document) and `bytes` (of text in all)."""
    encoded = tokenizer.encode(texts)
    lengths = np.array([len(ids) + 1 for ids in encoded], np.int64)
    tokens = np.empty(lengths.sum(), token_dtype(tokenizer.vocab_size))
    start = 0
    for ids in encoded:
        tokens[start : start + len(ids)] = ids
        tokens[start + len(ids)] = tokenizer.eos_id
        start += len(ids) + 1
    save_shard(path, tokens=tokens, lengths=lengths, bytes=sum(len(text.encode()) for text in texts))


def _is_whole(path: Path) -> bool:
    """Whether a shard of an interrupted run can be used."""
    try:
        tokens, lengths, _ = read_shard(path, "tokens", "lengths", "bytes")
    except Damaged:
        return False
    return len(tokens) == lengths.sum()


def read_shard(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays that `save_shard` wrote under this name, each with a checksum; raises Damaged for anything else."""
    try:
        with open_regular(path) as file, np.load(file) as arrays:
            values = [arrays[name] for name in names]
            place = str(arrays["place"])
    except Exception as error:  # zipfile and numpy have a dozen kinds of them for one bit that is flipped
        raise Damaged(f"{path} is damaged ({' '.join(str(error).split())[:200]})") from error
    if place != path.stem:
        raise Damaged(f"{path} was written as {place[:60]}")
    return values


def read_or_remove(path: Path, *names: str) -> list[np.ndarray]:
    """`read_shard` of one that is made again where it is missing: a damaged one is removed, and Damaged raised."""
    try:
        return read_shard(path, *names)
    except Damaged as error:
        path.unlink(missing_ok=True)
        raise Damaged(f"{path} was damaged and is removed: run the same command again, it rebuilds it") from error


def save_shard(path: Path, **arrays) -> None:
    """Write arrays to an npz file, whole or not at all, with the place that it has among the others."""
    buffer = io.BytesIO()
    np.savez(buffer, place=np.array(path.stem), **arrays)
    temporary = path.with_suffix(f".{os.getpid()}.new")
    with open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def merge_shards(
    shards: list[Path],
    directory: Path,
    tokenizer: Tokenizer,
    inputs: dict,
    facts: dict,
    left_out: np.ndarray | None = None,
) -> None:
    """Concatenate shards into the store of one split, without the documents `left_out` (bool [documents]); `facts` go
    into its manifest."""
    context_length, seen = inputs["context_length"], 0
    with new_artifact(directory, KIND, inputs, mapped=(TOKENS, WINDOWS)) as (path, info):
        num_tokens = documents = num_bytes = 0
        with open(path / TOKENS, "wb") as tokens_file, open(path / WINDOWS, "wb") as windows_file:
            for shard in shards:
                tokens, lengths, size = read_or_remove(shard, "tokens", "lengths", "bytes")
                if left_out is not None:
                    keep = ~left_out[seen : seen + len(lengths)]
                    seen += len(lengths)
                    tokens, lengths = tokens[np.repeat(keep, lengths)], lengths[keep]
                    size = tokenizer.token_bytes[tokens].sum(dtype=np.int64)
                num_bytes += int(size)
                windows = cut_windows(lengths, tokenizer.token_bytes[tokens], context_length)
                windows["offset"] += num_tokens
                windows["document"] += documents
                append_array(tokens_file, tokens)
                append_array(windows_file, windows)
                num_tokens += len(tokens)
                documents += len(lengths)
        dtype = token_dtype(tokenizer.vocab_size).str
        info.update(tokens=num_tokens, documents=documents, bytes=num_bytes, dtype=dtype)
        info.update(context_length=context_length, eos_id=tokenizer.eos_id, **facts)

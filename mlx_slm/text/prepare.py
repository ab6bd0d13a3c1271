"""Text -> token stores: read, drop exact duplicates, split by document, tokenise in shards by parallel processes.

A document's split depends on the hash of its text alone, so it stays where it is when the set grows. Each finished
shard is a file of its own; a run that was killed reads the text again and tokenises what is missing.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from mlx_slm.config import Config, known_domains
from mlx_slm.errors import Interrupted, SlmError, nearest
from mlx_slm.report import Report
from mlx_slm.text.sources import SPLITS, Reading, Source
from mlx_slm.text.store import KIND, TOKENS, WINDOWS, cut_windows
from mlx_slm.text.tokenizer import Tokenizer, sample_documents, train_tokenizer
from mlx_slm.workspace import MANIFEST, Workspace, fingerprint, load_manifest, new_artifact, read_json, write_json

SHARD_BYTES = 4 << 20


@dataclass
class Counts:
    """What was read: documents and bytes kept, and exact duplicates left out."""

    documents: int = 0
    bytes: int = 0
    duplicates: int = 0


class Documents:
    """The distinct documents of a set as (digest, text, split), in a fixed order: held-out sources first.

    A text that stands in a held-out source and in the training source is kept where it is held out.
    """

    def __init__(self, sources: list[Source], config: Config, reading: Reading):
        self.sources = sorted(sources, key=lambda s: {"test": 0, "valid": 1}.get(s.split, 2))
        self.reading, self.counts = reading, Counts()
        self._data = config.data

    def __iter__(self) -> Iterator[tuple[bytes, str, str]]:
        seen: set[bytes] = set()
        counts = self.counts = Counts()
        for source in self.sources:
            for text in source.documents(self.reading):
                digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
                if digest in seen:
                    counts.duplicates += 1
                    continue
                seen.add(digest)
                counts.documents += 1
                counts.bytes += len(text.encode())
                yield digest, text, source.split or self._split(digest)
                if self._data.limit and counts.bytes >= self._data.limit:
                    return

    def _split(self, digest: bytes) -> str:
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place < self._data.test_fraction:
            return "test"
        return "valid" if place < self._data.test_fraction + self._data.valid_fraction else "train"


def sources_of(name: str, given: list[str], workspace: Workspace, config: Config) -> list[str]:
    """The sources of a set: as given, configured, recorded, or shipped, in this order; raises SlmError for none."""
    if given:
        return given
    domains = known_domains()
    if name in config.data.sets:
        return config.data.sets[name]
    if (workspace.data(name, "train") / MANIFEST).exists():
        return load_manifest(workspace.data(name, "train"), KIND)["inputs"]["sources"]
    if name in domains:
        return domains[name]
    known = sorted({*config.data.sets, *workspace.sets(), *domains})
    raise SlmError(
        f"unknown set {name!r}{nearest(name, known)}; known: {', '.join(known) or 'none'}; "
        f"name its text: mlx-slm prepare {name} SOURCE..."
    )


def ensure_set(workspace: Workspace, name: str, config: Config, report: Report, limit: int | None = None) -> None:
    """Prepare a set that a command needs and that is missing, announced in one line; check one that is configured.

    `limit`: bytes of text to stream from the Hub where the configuration sets no limit.
    """
    exists = all((workspace.data(name, split) / MANIFEST).exists() for split in SPLITS)
    if exists and name not in config.data.sets:
        return
    sources = sources_of(name, [], workspace, config)
    if exists and not all(_reachable(source) for source in sources):
        return
    if not exists:
        if name != config.data.generic:
            ensure_set(workspace, config.data.generic, config, report)
        report.line(f"set {name!r} is not prepared yet: preparing it from {', '.join(sources)}")
    streamed = any(source.startswith("hf:") for source in sources)
    if limit and streamed and config.data.limit is None and not exists:
        gigabytes = limit / 1e9
        report.line(f"streaming {gigabytes:.1f} GB of text for this horizon")
        if gigabytes > 1 and not report.confirm("download it?"):
            raise Interrupted("not started; nothing was downloaded")
        config = config.model_copy(update={"data": config.data.model_copy(update={"limit": limit})})
    elif exists and streamed:
        return
    prepare(workspace, name, sources, config, report)


def _reachable(source: str) -> bool:
    """Whether a source can be compared with what was prepared: a local file may have moved since, and that is fine."""
    parsed = Source.parse(source)
    return parsed.remote or bool(glob.glob(str(Path(parsed.text).expanduser()), recursive=True))


def prepare(
    workspace: Workspace, name: str, sources: list[str], config: Config, report: Report, strict=False, fresh=False
) -> bool:
    """Make `data/<name>/{train,valid,test}` (and, for the generic set, the tokenizer first).

    Returns False if all is there already and nothing changed; raises SlmError if the inputs changed, unless `fresh`.
    """
    parsed = [Source.parse(text) for text in sources]
    reading = Reading(text_field=config.data.field, strict=strict)
    origin = fingerprint([[s.split, s.fingerprint()] for s in parsed])
    tokenizer = ensure_tokenizer(workspace, name, parsed, origin, config, report, fresh)
    inputs = {
        "sources": [s if s.startswith(("hf:", "docs:")) else _absolute(s) for s in sources],
        "text": origin,
        "tokenizer": tokenizer.fingerprint,
        "context_length": config.data.context_length,
        "reading": [config.data.field, config.data.limit, config.data.valid_fraction, config.data.test_fraction],
    }
    if not fresh and _up_to_date(workspace, name, inputs):
        return False
    documents = Documents(parsed, config, reading)
    partial = workspace.root / "data" / name / ".partial"
    _start_shards(partial, {k: v for k, v in inputs.items() if k != "sources"}, report)
    shards = tokenise(documents, tokenizer, partial, report, f"tokenising {name}")
    warn_about(reading, documents.counts, report, parsed)
    if not shards["train"]:
        raise SlmError(f"{name}: every document fell into a held-out split; add text, or name splits with train=PATH")
    for split in ("test", "valid", "train"):
        merge_shards(shards[split], workspace.data(name, split), tokenizer, config.data.context_length, inputs)
    shutil.rmtree(partial)
    return True


def ensure_tokenizer(workspace, name, sources: list[Source], origin: str, config: Config, report, fresh) -> Tokenizer:
    """Load the tokenizer, or train it if this is the generic set; raises SlmError for a domain that comes before."""
    settings = config.tokenizer.model_dump()
    exists = (workspace.tokenizer / MANIFEST).exists()
    if exists:
        tokenizer = Tokenizer(workspace.tokenizer)
        made = tokenizer.manifest["inputs"]
        if made["settings"] != settings and not (fresh and name == config.data.generic):
            changed = [k for k in settings if made["settings"].get(k) != settings[k]]
            raise SlmError(
                f"{workspace.tokenizer} was made with other settings (tokenizer.{', tokenizer.'.join(changed)}): "
                f"put them back, or rebuild with `mlx-slm prepare {config.data.generic} --fresh` and then every set"
            )
        # A grown generic set keeps its tokenizer: models and stores rest on it.
        if made["settings"] == settings:
            return tokenizer
    if name != config.data.generic:
        raise SlmError(
            f"no tokenizer yet: it is trained on the generic set, so prepare that first: "
            f"mlx-slm prepare {config.data.generic} SOURCE..."
        )
    reading = Reading(text_field=config.data.field)
    documents = Documents(sources, config, reading)
    with report.progress("reading a sample for the tokenizer", None, "B") as advance:

        def training_text():
            for digest, text, split in documents:
                advance(len(text))
                if split == "train":
                    yield digest, text

        texts = sample_documents(training_text(), config.tokenizer)
    if not documents.counts.documents:
        raise SlmError(_no_text(sources))
    size = sum(map(len, texts))
    report.line(f"training a tokenizer of {config.tokenizer.vocab_size:,} pieces on {size / 1e6:.1f} MB of text")
    return train_tokenizer(workspace.tokenizer, texts, config.tokenizer, {"settings": settings, "text": origin})


def tokenise(
    documents: Documents, tokenizer: Tokenizer, partial: Path, report: Report, title: str
) -> dict[str, list[Path]]:
    """Write shards of about 4 MB of text per split, those missing, in parallel; returns their paths in order."""
    shards: dict[str, list[Path]] = {split: [] for split in SPLITS}
    buffers: dict[str, list[str]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    workers = os.cpu_count() or 1
    pending: dict[Future, int] = {}
    pool = None

    def close(split: str, advance, last: bool) -> None:
        nonlocal pool
        texts, size = buffers[split], sizes[split]
        path = partial / f"{split}-{len(shards[split]):05d}.npz"
        shards[split].append(path)
        buffers[split], sizes[split] = [], 0
        if path.exists():
            advance(size)
        elif last and pool is None:
            write_shard(texts, tokenizer, path)
            advance(size)
        else:
            pool = pool or ProcessPoolExecutor(
                workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(tokenizer.directory,)
            )
            pending[pool.submit(_write_shard_in_worker, texts, path)] = size
            drain(advance, workers + 2)

    def drain(advance, most: int) -> None:
        while len(pending) > most:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                future.result()
                advance(pending.pop(future))

    try:
        with report.progress(title, None, "B") as advance:
            for _, text, split in documents:
                buffers[split].append(text)
                sizes[split] += len(text.encode())
                if sizes[split] >= SHARD_BYTES:
                    close(split, advance, last=False)
            for split in SPLITS:
                if buffers[split]:
                    close(split, advance, last=True)
            drain(advance, 0)
    finally:
        if pool:
            pool.shutdown(wait=True, cancel_futures=True)
    if not documents.counts.documents:
        raise SlmError(_no_text(documents.sources))
    return shards


_worker_tokenizer: Tokenizer | None = None


def _start_worker(directory: Path) -> None:
    import signal

    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker_tokenizer = Tokenizer(directory)


def _write_shard_in_worker(texts: list[str], path: Path) -> None:
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
    buffer = io.BytesIO()
    np.savez(buffer, tokens=tokens, lengths=lengths, bytes=sum(len(text.encode()) for text in texts))
    temporary = path.with_suffix(".new")
    with open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def merge_shards(shards: list[Path], directory: Path, tokenizer: Tokenizer, context_length: int, inputs: dict) -> None:
    """Concatenate shards into the store of one split."""
    with new_artifact(directory, KIND, inputs, mapped=(TOKENS, WINDOWS)) as (path, info):
        num_tokens = documents = num_bytes = 0
        with open(path / TOKENS, "wb") as tokens_file, open(path / WINDOWS, "wb") as windows_file:
            for shard in shards:
                with np.load(shard) as arrays:
                    tokens, lengths = arrays["tokens"], arrays["lengths"]
                    num_bytes += int(arrays["bytes"])
                windows = cut_windows(lengths, tokenizer.token_bytes[tokens], context_length)
                windows["offset"] += num_tokens
                windows["document"] += documents
                tokens.tofile(tokens_file)
                windows.tofile(windows_file)
                num_tokens += len(tokens)
                documents += len(lengths)
        dtype = token_dtype(tokenizer.vocab_size).str
        info.update(tokens=num_tokens, documents=documents, bytes=num_bytes, dtype=dtype)
        info.update(context_length=context_length, eos_id=tokenizer.eos_id)


def _up_to_date(workspace: Workspace, name: str, inputs: dict) -> bool:
    paths = [workspace.data(name, split) for split in SPLITS]
    if not all((path / MANIFEST).exists() for path in paths):
        return False
    for path in paths:
        made = load_manifest(path, KIND)["inputs"]
        changed = [key for key in inputs if key != "sources" and made.get(key) != inputs[key]]
        if changed:
            raise SlmError(
                f"{path} was made from other inputs ({', '.join(changed)} changed): "
                f"run `mlx-slm prepare {name} SOURCE... --fresh` to make it again"
            )
    return True


def _start_shards(partial: Path, plan: dict, report: Report) -> None:
    """Keep the shards of an interrupted run if they are of the same text, tokenizer and settings; else begin anew."""
    record = partial / "plan.json"
    if record.exists() and read_json(record) == plan:
        done = len(list(partial.glob("*.npz")))
        report.line(f"resuming: {done} finished shards are kept")
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(record, plan)


def warn_about(reading: Reading, counts: Counts, report: Report, sources) -> None:
    """One line per kind of thing that was mended or left out."""
    if counts.duplicates:
        report.line(f"left out {counts.duplicates:,} exact duplicates")
    if reading.replaced:
        report.warn(f"replaced invalid UTF-8 in {reading.replaced:,} documents (--strict fails instead)")
    if reading.empty_files:
        report.warn(f"no text in {', '.join(reading.empty_files[:5])}{' ...' if len(reading.empty_files) > 5 else ''}")


def _no_text(sources: list[Source]) -> str:
    named = ", ".join(source.text for source in sources)
    return f"no text in {named}: every file is empty or only white space; check the path and --field"


def _absolute(source: str) -> str:
    parsed = Source.parse(source)
    path = str(Path(parsed.text).expanduser().absolute())
    return f"{parsed.split}={path}" if parsed.split else path

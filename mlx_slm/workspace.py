"""Where artifacts live, and why they can be trusted.

An artifact is a directory with a `manifest.json` written last: the size of each file, its SHA-256 (or, for files that
are memory-mapped, a crc32 per block), what it was made from, and a fingerprint of its content. A directory without a
valid manifest does not exist. Directories are written under a temporary name, flushed, and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
import stat
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mlx_slm import forms
from mlx_slm.errors import Busy, SlmError, nearest
from mlx_slm.files import Damaged, open_regular, parse_json, read_bytes, read_json, require_form
from mlx_slm.report import Report

MANIFEST = "manifest.json"
BLOCK = 4 << 20
LINES_BYTES = 1 << 30


class Workspace:
    """One directory with everything that a user makes: by default $MLX_SLM_WORKSPACE, else ./workspace."""

    def __init__(self, root: str | os.PathLike | None = None):
        self.root = Path(root or os.environ.get("MLX_SLM_WORKSPACE") or "workspace").expanduser()
        self.config_file = self.root / "config.yaml"
        self.tokenizer = self.root / "tokenizer"
        self.results = self.root / "results"

    def data(self, name: str, split: str) -> Path:
        return _named(self.root / "data", name) / split

    def embeddings(self, encoder: str, name: str, split: str) -> Path:
        return _named(self.root / "embeddings" / encoder, name) / split

    def clusters(self, k: int) -> Path:
        return self.root / "clusters" / str(k)

    def run(self, name: str) -> Path:
        return _named(self.root / "runs", name)

    def model(self, name: str) -> Path:
        return _named(self.root / "models", name)

    def adapter(self, name: str) -> Path:
        return _named(self.root / "adapters", name)

    def sets(self) -> list[str]:
        """Names of the prepared sets."""
        return sorted(p.parent.parent.name for p in self.root.glob(f"data/*/train/{MANIFEST}"))

    def runs(self) -> list[str]:
        return sorted(p.parent.name for p in self.root.glob("runs/*/run.json"))

    def models(self) -> list[str]:
        return sorted(p.parent.name for p in self.root.glob(f"models/*/{MANIFEST}"))

    def adapters(self) -> list[str]:
        return sorted(p.parent.name for p in self.root.glob(f"adapters/*/{MANIFEST}"))

    def artifacts(self) -> Iterator[Path]:
        """Every directory here that has a manifest."""
        found = sorted(self.root.rglob(MANIFEST))
        return (p.parent for p in found if not any(q.startswith(".") for q in p.relative_to(self.root).parts))

    def require_set(self, name: str, split: str = "train") -> Path:
        """Return the directory of a prepared split, or raise with the known sets."""
        path = self.data(name, split)
        recover(path)
        if not (path / MANIFEST).exists():
            known = self.sets()
            listed = ", ".join(known) or "none yet"
            hint = nearest(name, known) if name not in known else ""
            what = f"the {split} split of {name!r}" if name in known else f"set {name!r}"
            raise SlmError(f"{what} is not prepared{hint}; prepared: {listed}; run `mlx-slm prepare {name} SOURCE...`")
        return path


@contextlib.contextmanager
def alone(lock: Path, busy: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock file; a process loses it when it ends.

    If another process has it: with `waiting` call that and wait, else raise Busy with the text `busy`.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if waiting is None:
                raise Busy(busy) from error
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def in_use(workspace: Workspace, name: str) -> Iterator[None]:
    """While a training reads a set nobody makes it anew. Several may read it."""
    with _set_lock(workspace, name) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def unused(workspace: Workspace, name: str) -> Iterator[None]:
    """While a set is replaced nobody reads it; raises Busy where a training does."""
    with _set_lock(workspace, name) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(
                f"set {name!r} is in use by another process, which trains on it: wait until it ends, then run the same "
                "command again; what was read is kept"
            ) from error
        yield


def _set_lock(workspace: Workspace, name: str):
    lock = workspace.root / "data" / f".{plain_name(name)}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    return open(lock, "w")


def append_json(file: Path, record: dict) -> None:
    """Add a line of JSON with one write, on a line of its own even behind one that a kill cut off. Its last key is
    `crc`, of what stands before it."""
    with open(file, "ab+", buffering=0) as out:
        if out.seek(0, os.SEEK_END):
            out.seek(-1, os.SEEK_END)
        whole = out.read(1) in (b"\n", b"")
        out.write((b"" if whole else b"\n") + json_line(record).encode())


def json_line(record: dict) -> str:
    """A record as a line of `append_json`."""
    body = json.dumps(record)
    return f'{body[:-1]}, "crc": {zlib.crc32(body.encode())}}}\n'


def read_json_lines(file: Path, report: Report | None = None) -> list[dict]:
    """The records of a file that `append_json` wrote, without their `crc`; none if there is no file.

    A last line that a kill cut off is left out; other lines that are damaged are too, and `report` says how many.
    """
    records = _records(file)
    if damaged := report and records[:-1].count(None):
        report.warn(f"{file}: {damaged} damaged lines are left out")
    return [record for record in records if record is not None]


def count_damaged_lines(file: Path) -> int:
    """Lines of a file that `append_json` wrote, but for one that a kill cut off, which are not as they were."""
    return _records(file)[:-1].count(None)


def _records(file: Path) -> list[dict | None]:
    """The record of each line, None for a damaged one; the last is what stands behind the last line end."""
    lines = read_bytes(file, LINES_BYTES).decode("utf-8", "replace").split("\n") if file.exists() else [""]
    return [_record(line) for line in lines]


def _record(line: str) -> dict | None:
    body, mark, crc = line.rpartition(', "crc": ')
    body += "}"
    if not mark or crc != f"{zlib.crc32(body.encode())}}}":
        return None
    return parse_json(body)


def plain_name(name: str) -> str:
    """Return `name` if it can name a set, a run or a model; raises SlmError for a path or an option."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise SlmError(f"{name!r} is not a name: a set, a run or a model is named with letters, digits and . _ + -")
    return name


def _named(folder: Path, name: str) -> Path:
    """The directory of this name; raises SlmError where a disk that ignores case has it under another one."""
    path = folder / plain_name(name)
    if path.exists():
        known = {unicodedata.normalize("NFC", entry) for entry in os.listdir(folder)}
        if unicodedata.normalize("NFC", name) not in known:
            other = next((entry for entry in known if entry.casefold() == name.casefold()), "another one")
            raise SlmError(f"{name!r} is {other!r} in {folder} on this disk, which ignores case: choose another name")
    return path


def is_litter(path: Path) -> bool:
    """Whether a file is one that macOS leaves in any folder."""
    return path.name == ".DS_Store" or path.name.startswith("._")


def fingerprint(value) -> str:
    """SHA-256 of the canonical JSON of `value`: equal if and only if the values are equal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file; above 64 MiB of its size and its first and last MiB, cheap enough to ask at each start."""
    size = path.stat().st_size
    if size <= 64 << 20:
        return sha256(path)
    with open(path, "rb") as file:
        head = file.read(1 << 20)
        file.seek(-(1 << 20), os.SEEK_END)
        return hashlib.sha256(head + file.read() + str(size).encode()).hexdigest()


def write_json(path: Path, value) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    if any("\ud800" <= sign <= "\udfff" for sign in text):  # of a file name that is no UTF-8
        text = json.dumps(value, indent=1)
    write_text(path, text)


def write_record(path: Path, record: dict) -> None:
    """Write a dict as JSON with its own checksum; `read_record` gives it back."""
    record = json.loads(json.dumps(record))
    write_json(path, record | {"checksum": fingerprint(record)})


def read_record(path: Path, form: type | None = None) -> dict:
    """What `write_record` wrote; raises Damaged where a byte of it changed since, or it is not of a form."""
    found = read_json(path)
    checksum = found.pop("checksum", None) if isinstance(found, dict) else None
    if checksum != fingerprint(found):
        raise Damaged(f"{path} was changed after it was written; bring it back, or begin anew with --fresh")
    if form is not None:
        require_form(found, form, path)
    return found


def write_text(path: Path, text: str) -> None:
    """Write a text file, likewise whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def new_artifact(path: Path, kind: str, inputs: dict, mapped: tuple[str, ...] = ()) -> Iterator[tuple[Path, dict]]:
    """Write an artifact, whole or not at all: yields a temporary directory and a dict of facts for the manifest.

    `inputs` says what it is made from (fingerprints, settings). Files named in `mapped` get a crc32 per block.
    An older artifact at `path` stays until the new one is whole.
    """
    temporary = path.with_name(f".{path.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    info: dict = {}
    try:
        yield temporary, info
        files = {}
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            name = file.relative_to(temporary).as_posix()
            digest = {"crc32": block_checksums(file), "block": BLOCK} if name in mapped else {"sha256": sha256(file)}
            files[name] = {"bytes": file.stat().st_size, **digest}
            _sync(file)
        manifest = {"kind": kind, "inputs": inputs, "info": info, "files": files}
        manifest["fingerprint"] = fingerprint([kind, files])
        manifest["checksum"] = fingerprint(manifest)
        write_json(temporary / MANIFEST, manifest)
        _sync(temporary)
        replace_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_directory(new: Path, path: Path) -> None:
    """Put a whole directory in the place of another, which stays until then."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Bring back the older artifact if a replacement was cut off between its two renames."""
    old = path.with_name(f".{path.name}.old")
    if not path.exists() and (old / MANIFEST).exists():
        os.rename(old, path)


def load_manifest(path: Path, kind: str) -> dict:
    """Return the manifest at `path` after checking form, kind, names and sizes; raises SlmError or Damaged."""
    recover(path)
    if not (path / MANIFEST).exists():
        raise SlmError(f"{path} holds no {kind} (no {MANIFEST})")
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise Damaged(f"{path} is not a {kind}")
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    if fingerprint(body) != manifest.get("checksum"):
        raise Damaged(f"{path / MANIFEST} was changed after it was written; remove {path} and make it again")
    require_form(manifest, forms.Manifest, path / MANIFEST)
    for part, known in (("info", forms.INFO), ("inputs", forms.INPUTS)):
        if kind in known:
            require_form(manifest[part], known[kind], f"{path / MANIFEST}, {part}")
    for name, entry in manifest["files"].items():
        file = path / name
        with contextlib.suppress(OSError):
            stat_ = file.stat()
            if stat.S_ISREG(stat_.st_mode) and stat_.st_size == entry["bytes"]:
                continue
        found = f"has {file.stat().st_size} bytes" if file.is_file() else "is missing"
        raise Damaged(f"{file} {found}, {entry['bytes']} were written; remove {path} and make it again")
    return manifest


def verify(path: Path, manifest: dict, names: list[str] | None = None) -> None:
    """Check every byte of an artifact (or of the files named) against its manifest; raises Damaged."""
    for name in names or manifest["files"]:
        entry = manifest["files"][name]
        good = sha256(path / name) == entry["sha256"] if "sha256" in entry else None
        if good is None:
            good = block_checksums(path / name, entry["block"]) == entry["crc32"]
        if not good:
            raise Damaged(f"{path / name} is damaged (checksum differs); remove {path} and make it again")


SHORT = 4096
"""Elements that are read, not mapped: one number of a mapped file can make two megabytes of it resident."""


class MappedFile:
    """A memory-mapped array whose blocks are checked against their crc32 when they are first touched.

    A check reads its block into memory of its own, so that pages which nobody looks at are not mapped.
    """

    def __init__(self, path: Path, dtype, entry: dict):
        self.path, self.dtype = path, np.dtype(dtype)
        self._crc, self._block, self._bytes = entry["crc32"], entry["block"], entry["bytes"]
        self._file = open(path, "rb", buffering=0)
        self._array = np.zeros(0, self.dtype)
        if entry["bytes"]:
            self._array = np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), self.dtype)
        self._seen = np.zeros(len(self._crc), bool)

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index):
        """An element or a slice with step 1, as numpy would give it."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise IndexError("a mapped file has no slices with a step")
        else:
            start = index + len(self) if index < 0 else index
            stop = start + 1
            if not 0 <= start < len(self):
                raise IndexError(f"element {index} of {len(self)}")
        size = self.dtype.itemsize
        if os.fstat(self._file.fileno()).st_size < self._bytes:  # a mapped page beyond the end would be a bus error
            raise Damaged(f"{self.path} was cut off while it was in use; make {self.path.parent} again")
        if stop > start:
            first, last = start * size // self._block, (stop * size - 1) // self._block
            if not self._seen[first : last + 1].all():
                self._check(first, last)
        if not 0 < stop - start <= SHORT:
            return self._array[index]
        found = np.frombuffer(self._read(start * size, (stop - start) * size), self.dtype)
        return found if isinstance(index, slice) else found[0]

    def _read(self, start: int, size: int) -> bytes:
        data = os.pread(self._file.fileno(), size, start)
        if len(data) != size:
            raise Damaged(f"{self.path} was cut off while it was in use; make {self.path.parent} again")
        return data

    def _check(self, first: int, last: int) -> None:
        for block in range(first, last + 1):
            if self._seen[block]:
                continue
            data = self._read(block * self._block, min(self._block, self._bytes - block * self._block))
            if zlib.crc32(data) != self._crc[block]:
                raise Damaged(
                    f"{self.path} is damaged in bytes {block * self._block}-{block * self._block + len(data)}; "
                    f"remove {self.path.parent} and prepare it again"
                )
            self._seen[block] = True


def block_checksums(path: Path, block: int = BLOCK) -> list[int]:
    """crc32 of each block of a file."""
    with open_regular(path) as file:
        return [zlib.crc32(data) for data in iter(lambda: file.read(block), b"")]


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

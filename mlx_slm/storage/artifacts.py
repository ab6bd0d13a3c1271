"""Where artifacts live, and why they can be trusted.

An artifact is a directory with a `manifest.json` written last: the size of each file, its SHA-256 (or, for files that
are memory-mapped, a crc32 per block), what it was made from, and a fingerprint of its content. A directory without a
valid manifest does not exist. Directories are written under a temporary name, flushed, and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

from mlx_slm.errors import SlmError
from mlx_slm.files import Damaged, open_regular, read_json, require_form
from mlx_slm.storage import formats, forms
from mlx_slm.storage.records import fingerprint, write_json

MANIFEST = "manifest.json"
BLOCK = 4 << 20
EDITABLE = "README.md"
"""Its reader may change it: no manifest lists it, and where an older one does, it is not checked."""


def is_litter(path: Path) -> bool:
    """Whether a file is one that macOS leaves in any folder."""
    return path.name == ".DS_Store" or path.name.startswith("._")


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file; above 64 MiB of its size and its first and last MiB, cheap enough to ask at each start."""
    size = path.stat().st_size
    if size <= 64 << 20:
        return sha256(path)
    with open(path, "rb") as file:
        head = file.read(1 << 20)
        file.seek(-(1 << 20), os.SEEK_END)
        return hashlib.sha256(head + file.read() + str(size).encode()).hexdigest()


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
        for file in sorted(p for p in temporary.rglob("*") if p.is_file() and p.name != EDITABLE):
            name = file.relative_to(temporary).as_posix()
            digest = {"crc32": block_checksums(file), "block": BLOCK} if name in mapped else {"sha256": sha256(file)}
            files[name] = {"bytes": file.stat().st_size, **digest}
            sync(file)
        numbered = inputs | {formats.KEY: formats.FORMATS.get(kind, 1)}
        manifest = {"kind": kind, "inputs": numbered, "info": info, "files": files}
        manifest["fingerprint"] = fingerprint([kind, files])
        manifest["checksum"] = fingerprint(manifest)
        write_json(temporary / MANIFEST, manifest)
        sync(temporary)
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
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Bring back the older artifact if a replacement was cut off between its two renames."""
    old = path.with_name(f".{path.name}.old")
    if not path.exists() and (old / MANIFEST).exists():
        os.rename(old, path)


def is_made(path: Path, kind: str, inputs: dict | None = None) -> bool:
    """Whether there is an artifact at `path`, in the format of this version, and made from `inputs` where given."""
    try:
        return (path / MANIFEST).exists() and inputs in (None, load_manifest(path, kind)["inputs"])
    except formats.OtherFormat:
        return False


def load_manifest(path: Path, kind: str, any_format: bool = False) -> dict:
    """Return the manifest at `path` after checking form, kind, format, names and sizes; raises SlmError or Damaged."""
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
    number = manifest["inputs"].pop(formats.KEY, 1)
    if not any_format:
        formats.require_format(path, kind, number)
    for part, known in (("info", forms.INFO), ("inputs", forms.INPUTS)):
        if kind in known:
            require_form(manifest[part], known[kind], f"{path / MANIFEST}, {part}")
    manifest["files"].pop(EDITABLE, None)
    for name, entry in manifest["files"].items():
        file = path / name
        with contextlib.suppress(OSError):
            stat_ = file.stat()
            if stat.S_ISREG(stat_.st_mode) and stat_.st_size == entry["bytes"]:
                continue
        fault = f"has {file.stat().st_size} bytes" if file.is_file() else "is missing"
        raise Damaged(f"{file} {fault}, {entry['bytes']} were written; remove {path} and make it again")
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


def block_checksums(path: Path, block: int = BLOCK) -> list[int]:
    """crc32 of each block of a file."""
    with open_regular(path) as file:
        return [zlib.crc32(data) for data in iter(lambda: file.read(block), b"")]


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Bring a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

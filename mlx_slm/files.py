"""The door for what is read: regular files of a sane size, JSON and YAML of a known form, whole safetensors.

Whatever is wrong with a file, whoever wrote it, becomes one sentence that names it. Nothing here waits (for a pipe),
reads without an end (from a device), or follows a link where links have no business to be.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
import yaml
from pydantic import TypeAdapter, ValidationError

from mlx_slm.errors import SlmError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

JSON_BYTES = 256 << 20
YAML_BYTES = 16 << 20
YAML_NODES = 1_000_000
"""Values that a YAML file may stand for when its aliases are written out."""
NAME_BYTES = 255

Form = TypeVar("Form")


class Damaged(SlmError):
    """Something that is not what was written, or of no form that is known."""


def open_regular(path: Path, links: bool = True) -> io.FileIO:
    """Open a regular file for bytes, unbuffered; raises Damaged for anything else, and for a link unless `links`.

    Other errors of the system are raised as they are.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    if not links and Path(path).is_symlink():
        raise Damaged(f"{path} is a link: only files themselves are read there")
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged(f"{path} is not a file with bytes of its own, but a folder, a pipe or a device")
    return open(descriptor, "rb", buffering=0)


def read_bytes(path: Path, limit: int, links: bool = True) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; raises Damaged for a larger or missing one."""
    try:
        with open_regular(path, links) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise Damaged(f"{path} has {size:,} bytes, more than the {limit:,} that such a file may have")
            return file.readall()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise Damaged(f"{path} is missing; bring it back or make it again") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise Damaged(f"{str(path)[:200]}: {error.strerror}") from error
        raise


def read_text(path: Path, limit: int) -> str:
    """UTF-8 text, likewise."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Damaged(f"{path}: not UTF-8 text (byte {error.start})") from error


def parse_json(text: str | bytes):
    """JSON -> Python; raises ValueError for what is none, however deeply nested, and for a key that is there twice."""
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _without_twins(pairs: list[tuple[str, object]]) -> dict:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        twin = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twin[:60]!r} is there twice")
    return mapping


def read_json(path: Path, form: type[Form] | None = None, links: bool = True):
    """The value of a JSON file as it stands there, of the form of a pydantic model or type where one is given.

    Raises Damaged, naming the file and what is wrong with it.
    """
    try:
        value = parse_json(read_bytes(path, JSON_BYTES, links))
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise Damaged(f"{path} is damaged ({reason}); remove it and run the command again") from error
    if form is not None:
        require_form(value, form, path)
    return value


def require_form(value, form: Any, where: Path | str) -> Any:
    """The value as a pydantic model; raises Damaged with the first thing that is not of its form."""
    try:
        return TypeAdapter(form).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:60] for part in first["loc"]) or "it"
        message = first["msg"].removeprefix("Value error, ")
        raise Damaged(
            f"{where} is not of a form that is known here: {place}: {message[:1].lower()}{message[1:]}"
        ) from error
    except RecursionError as error:
        raise Damaged(f"{where} is nested too deeply") from error


def read_yaml(path: Path):
    """The value of a YAML file; raises SlmError for one that is none, or that its aliases blow up."""
    return parse_yaml(read_text(path, YAML_BYTES), path)


def parse_yaml(text: str, where: Path | str):
    """The value of a YAML text, likewise."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None and _expanded(node, {}) > YAML_NODES:
            raise SlmError(f"{where}: its aliases stand for more than {YAML_NODES:,} values: write them out")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SlmError(f"{where}: not valid YAML: {' '.join(str(error).split())[:300]}") from error
    except RecursionError as error:
        raise SlmError(f"{where}: not valid YAML: nested too deeply") from error


def _expanded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values that a node stands for; one that contains itself stands for more than any limit."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = YAML_NODES + 1
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_expanded(part, sizes) for part in parts)
    return sizes[id(node)]


def require_safetensors(path: Path, links: bool = True) -> None:
    """Raise SlmError for a file that is no whole safetensors file: its header, shapes and offsets fit its bytes."""
    from safetensors import SafetensorError, safe_open

    open_regular(path, links).close()
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise Damaged(f"{path} is not a whole safetensors file: {' '.join(str(error).split())[:200]}") from error
    if not names:
        raise Damaged(f"{path} is a safetensors file without tensors")


def read_arrays(path: Path, wanted: dict[str, int] | None = None) -> dict[str, np.ndarray]:
    """Arrays of a safetensors file; raises Damaged unless those of `wanted` are there, fp32 with this many axes."""
    from safetensors.numpy import load_file

    require_safetensors(path)
    try:
        arrays = load_file(path)
    except (KeyError, TypeError) as error:  # a dtype that numpy does not have
        raise Damaged(f"{path} has numbers of a type that is not known here: {error}") from error
    for name, axes in (wanted or {}).items():
        if name not in arrays or arrays[name].ndim != axes or arrays[name].dtype != np.float32:
            raise Damaged(f"{path} has no {name} of {axes} axes in fp32")
    return arrays


def write_arrays(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors; raises OSError where the disk does not take it."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(arrays, path, metadata=metadata)
    except SafetensorError as error:
        full = "os error 28" in str(error) or "os error 122" in str(error)  # the disk, or the user's quota
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error


def append_array(file: BinaryIO, values: np.ndarray) -> None:
    """Write the bytes of an array to an open file; raises OSError with its cause, which numpy's `tofile` does not."""
    file.write(np.ascontiguousarray(values).data.cast("B") if values.size else b"")


def load_tokenizer_json(path: Path) -> Tokenizer:
    """A `tokenizers.Tokenizer`; raises Damaged for a file that is none."""
    from tokenizers import Tokenizer

    text = read_text(path, JSON_BYTES)
    try:
        return Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a bare Exception, or what pyo3 makes of a panic
        raise Damaged(f"{path} is not a tokenizer: {' '.join(str(error).split())[:200]}") from error


def is_plain(name: str) -> bool:
    """Whether a name is a relative path of plain parts, inside its directory wherever that lies."""
    parts = name.split("/")
    return all(
        re.fullmatch(r"[^\x00-\x1f\x7f/\\:]+", part) and part.strip(".") and len(part.encode()) <= NAME_BYTES
        for part in parts
    )


def regular_files(directory: Path, is_litter=lambda path: False) -> Iterator[str]:
    """Names of all files in a directory, as relative paths; raises Damaged for a link, a device, a pipe, a socket."""
    folders: list[Path] = [Path(directory)]
    while folders:
        for entry in _sorted(os.scandir(folders.pop())):
            path = Path(entry.path)
            if is_litter(path):
                continue
            if entry.is_symlink():
                raise Damaged(f"{path} is a link: a directory to hand over has files of its own only; get it again")
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_file(follow_symlinks=False):
                yield path.relative_to(directory).as_posix()
            else:
                raise Damaged(f"{path} is a device, a pipe or a socket, not a file; get the directory again")


def _sorted(entries: Iterable[os.DirEntry]) -> list[os.DirEntry]:
    return sorted(entries, key=lambda entry: entry.name)

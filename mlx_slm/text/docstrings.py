"""`docs:` sources: the docstrings of installed packages and of the standard library, text that every machine has.

Files are parsed with `ast`, never imported. They are read in an order that depends on their names alone, so that a
limit takes the same mixture of packages wherever it stops. One docstring is one document.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import re
import signal
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

from mlx_slm.errors import SlmError, nearest

SKIPPED = {"test", "tests", "site-packages", "__pycache__", "lib2to3", "idlelib"}
SHORTEST = 80
FILES_PER_TASK = 64


def documents(packages: str) -> Iterator[str]:
    """Yield docstrings of at least 80 characters for 'numpy,rich' or '*,-numpy' ('stdlib' is a package)."""
    files = sorted(_files(packages), key=lambda item: hashlib.blake2b(item[0].encode()).digest())
    tasks = [[path for _, path in files[i : i + FILES_PER_TASK]] for i in range(0, len(files), FILES_PER_TASK)]
    if len(tasks) == 1:
        yield from docstrings(tasks[0])
        return
    pool = ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_leave_interrupts_to_the_parent)
    try:
        for texts in pool.map(docstrings, tasks):
            yield from texts
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def docstrings(paths: list[Path]) -> list[str]:
    """Docstrings of modules, classes and functions in these files, indentation removed."""
    texts = []
    for path in paths:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node, clean=False)
                if text and len(text := inspect.cleandoc(text)) >= SHORTEST:
                    texts.append(text)
    return texts


def versions(packages: str) -> list[str]:
    """The packages of a source with their versions: what its text depends on."""
    names = sorted({name for name, _ in _roots(packages)})
    owners = metadata.packages_distributions()
    return [f"{n} {_version(n, owners)}" for n in names]


def _version(name: str, owners) -> str:
    if name == "stdlib":
        return platform.python_version()
    return metadata.version(owners[name][0]) if name in owners else "?"


def _roots(packages: str) -> list[tuple[str, Path]]:
    """(package, directory or file) of each package in the selection; raises SlmError for one that is not installed."""
    libraries = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    installed = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    for library in libraries:
        for path in sorted(Path(library).iterdir()):
            name = path.stem if path.suffix == ".py" else path.name
            if re.fullmatch(r"[A-Za-z]\w*", name) and (path.suffix == ".py" or any(path.glob("*.py"))):
                installed[name] = path
    wanted = [name.strip() for name in packages.split(",") if name.strip()]
    for name in (name.removeprefix("-") for name in wanted):
        if name != "*" and name not in installed:
            raise SlmError(f"docs:{packages}: package {name!r} is not installed here{nearest(name, installed)}")
    chosen = set(installed) if "*" in wanted else {name for name in wanted if not name.startswith("-")}
    chosen -= {name[1:] for name in wanted if name.startswith("-")}
    return [(name, installed[name]) for name in sorted(chosen)]


def _files(packages: str) -> list[tuple[str, Path]]:
    files = []
    for name, root in _roots(packages):
        paths = [root] if root.is_file() else root.rglob("*.py")
        for path in paths:
            inner = path.relative_to(root.parent).parts[1:]
            if not SKIPPED.intersection(inner):
                files.append(("/".join((name, *inner)), path))
    return files

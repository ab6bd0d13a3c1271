"""The BLAS in front of MLX's own on a Linux CPU: which ones are there, and which is the fastest on this machine.

MLX's wheel for CPUs links a reference BLAS (5 GFLOP/s on two cores); a CBLAS that is loaded before it with global
symbols takes its place (130 - 300). Which one is best depends on the processor (docs/benchmarks.md), so where there are
several each does for some tenths of a second what a training step does, in a process of its own (only one can be
loaded), once per machine: the outcome is kept in the cache. Nothing here imports mlx at module level.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import shutil
import site
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

VARIABLE, NONE = "MLX_SLM_BLAS", "none"
"""The variable that names a library, and its value for MLX's own."""
PACKAGE = "scipy_openblas32"
"""OpenBLAS on PyPI, with `scipy_` in front of every symbol."""
NAMES = (
    *("cblas_sgemm", "cblas_dgemm", "cblas_cgemm"),
    *("sgeqrf_", "dgeqrf_", "sorgqr_", "dorgqr_", "sgetrf_", "dgetrf_", "sgetri_", "dgetri_", "strtri_", "dtrtri_"),
    *("spotrf_", "dpotrf_", "ssyevd_", "dsyevd_", "cheevd_", "sgeev_", "dgeev_", "cgeev_"),
    *("sgesdd_", "dgesdd_", "cgesdd_"),
)
"""What MLX's library imports of BLAS and LAPACK."""
THREADS = {"MKL_Set_Num_Threads": "MKL_Get_Max_Threads", "openblas_set_num_threads": "openblas_get_num_threads"}
"""What sets a library's threads, and what tells them."""
SYSTEM = "libopenblas.so.0"
PROCESSOR = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "stepping",
    "flags",
    "CPU implementer",
    "CPU part",
    "Features",
)
TRIAL_SECONDS = 0.2


@dataclass(frozen=True)
class Blas:
    """A library to load. `measured`: GFLOP/s of each candidate in the trial, by name; empty without a trial."""

    name: str
    path: str
    measured: dict[str, float]


def find(cores: int) -> Blas | None:
    """The library to load for some cores, or None for MLX's own: the one that $MLX_SLM_BLAS names, else the fastest
    that is here."""
    named = os.path.expanduser(os.environ.get(VARIABLE, ""))
    if named == NONE:
        return None
    there = candidates()
    if named:
        return Blas(next((name for name, path in there.items() if path == named), named), named, {})
    if len(there) < 2:
        return next((Blas(name, path, {}) for name, path in there.items()), None)
    measured = _measured(there, cores)
    best = max(there, key=lambda name: measured.get(name, 0.0))
    return Blas(best, there[best], measured)


def candidates() -> dict[str, str]:
    """Paths of the libraries that are here, by name, the likeliest first."""
    paths = {}
    prefixes = dict.fromkeys([sys.prefix, sys.base_prefix, site.getuserbase() or sys.prefix])
    mkl = [str(p) for prefix in prefixes for p in sorted(Path(prefix, "lib").glob("libmkl_rt.so*"))]
    if mkl:
        paths["mkl"] = mkl[0]
    if shim := _with_plain_names():
        paths["scipy-openblas32"] = shim
    if system := _system_path():
        paths["libopenblas"] = system
    return paths


def _system_path() -> str | None:
    """Where conda put OpenBLAS beside Python, or where the loader finds the system's."""
    debian = f"/usr/lib/{platform.machine()}-linux-gnu"
    folders = [f"{sys.prefix}/lib", *filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)), debian]
    folders += [f"{debian}/openblas-pthread", "/usr/lib64", "/usr/local/lib64", "/usr/local/lib", "/usr/lib"]
    return next((f"{folder}/{SYSTEM}" for folder in folders if os.path.exists(f"{folder}/{SYSTEM}")), None)


def load(blas: Blas | None) -> tuple[Blas, ctypes.CDLL] | tuple[None, None]:
    """Load a library with global symbols; where that fails, warn and take another one that is here."""
    if blas is None:
        return None, None
    try:
        return blas, ctypes.CDLL(blas.path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        cause = f"${VARIABLE}={blas.path}" if os.environ.get(VARIABLE) else f"the BLAS {blas.path}"
        warnings.warn(f"{cause} cannot be loaded: {error}", stacklevel=4)
    for name, path in candidates().items():
        with contextlib.suppress(OSError):
            return Blas(name, path, {}), ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return None, None


def cache() -> Path:
    """Where the shim and the measurements are kept; a folder for temporary files where a user has no home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        base = Path(tempfile.gettempdir(), f"cache-{os.getuid()}")
    return Path(base, "mlx-slm")


def processor() -> dict[str, str]:
    """What /proc/cpuinfo says of the first core that tells processors apart; empty without it."""
    told = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in itertools.takewhile(str.strip, lines):
            name, _, value = line.partition(":")
            told[name.strip()] = value.strip()
    return {name: told[name] for name in PROCESSOR if name in told}


def _with_plain_names() -> str | None:
    """A library of jumps from the plain names to those of `PACKAGE`, made by g++ once; None without either."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations or platform.machine() != "x86_64":
        return None
    folder = Path(spec.submodule_search_locations[0], "lib")
    library = folder / "libscipy_openblas.so"
    names = (*NAMES, "openblas_set_num_threads", THREADS["openblas_set_num_threads"])
    code = "".join(f".globl {n}\n.type {n}, @function\n{n}: jmp scipy_{n}@PLT\n" for n in names)
    code += '.section .note.GNU-stack,"",@progbits\n'
    made_from = hashlib.sha256(f"{library} {_identity(str(library))}\n{code}".encode()).hexdigest()
    shim = cache() / f"openblas-{made_from[:16]}.so"
    if shim.exists():
        return str(shim)
    if not library.exists() or not shutil.which("g++"):
        return None
    try:
        shim.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=shim.parent) as scratch:
            source, made = Path(scratch, "jumps.s"), Path(scratch, "jumps.so")
            source.write_text(code)
            linked = [f"-L{folder}", "-lscipy_openblas", f"-Wl,-rpath,{folder}"]
            subprocess.run(
                ["g++", "-shared", "-nostdlib", "-o", made, source, *linked], check=True, capture_output=True
            )
            os.replace(made, shim)
    except (OSError, subprocess.CalledProcessError):
        return None
    return str(shim)


def _identity(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError:
        return "gone"
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _measured(there: dict[str, str], cores: int) -> dict[str, float]:
    """GFLOP/s of each library in a trial, from the cache where the same ones were tried on this machine; one process
    tries at a time. Empty where nothing can be kept: it would be measured at each start."""
    libraries = [f"{name} {path} {_identity(path)}" for name, path in there.items()]
    told = processor()
    machine = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    key = "; ".join([f"{told.get('model name', platform.machine())} ({machine}), {cores} cores", *libraries])
    file = cache() / "blas.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_name("blas.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = _known(file)
            if isinstance(known.get(key), dict):
                return known[key]
            temporary = file.with_name(".blas.tmp")
            temporary.touch()
            speeds, complete = _tried_all(there)
            if complete:
                temporary.write_text(json.dumps(known | {key: speeds}, indent=1))
                os.replace(temporary, file)
            return speeds
    except OSError:
        return {}


def _known(file: Path) -> dict:
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(file.read_text())
        return known if isinstance(known, dict) else {}
    return {}


def _tried_all(there: dict[str, str]) -> tuple[dict[str, float], bool]:
    """(GFLOP/s of each, whether no trial took so long that the machine was too busy to tell)."""
    try:
        speeds = {name: _tried(path) for name, path in there.items()}
        for name in speeds:  # a second turn for those that are close: another process may have disturbed the first
            if speeds[name] > 0.75 * max(speeds.values()):
                speeds[name] = max(speeds[name], _tried(there[name]))
    except subprocess.TimeoutExpired:
        return {}, False
    return speeds, True


def _tried(path: str) -> float:
    """The outcome of `trial` with a library, 0 where it failed. Raises TimeoutExpired after ten seconds."""
    script = "import mlx_slm.machine.blas; print(mlx_slm.machine.blas.trial())"
    root = str(Path(__file__).parents[2])
    search = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {VARIABLE: path, "PYTHONPATH": search, "MLX_SLM_AS_GPU": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=10, check=True
        )
        return round(float(done.stdout), 1)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return 0.0


def trial() -> float:
    """GFLOP/s of the products of a training step in this process, side by side in its lanes, the best round.

    Raises OSError where the BLAS that $MLX_SLM_BLAS names was not loaded.
    """
    from mlx_slm.machine import runtime

    if runtime.blas is None or runtime.blas.path != os.environ.get(VARIABLE):
        raise OSError(f"${VARIABLE} was not loaded")
    import mlx.core as mx

    streams = runtime.lanes()
    shapes = [(1024, 256, 704), (256, 256, 8192), (8192, 256, 256), (256, 1024, 704)]
    pairs = [tuple(mx.ones(shape) for shape in ((n, k), (k, m))) for n, k, m in shapes]
    heads = mx.ones((16, 128, 64)), mx.ones((16, 64, 128))
    mx.eval(pairs, heads)
    flops = len(streams) * (sum(2 * n * k * m for n, k, m in shapes) + 4 * 2 * 16 * 128 * 64 * 128)
    best, begun = float("inf"), time.perf_counter()
    with runtime.sharing_cores(len(streams)):
        while best == float("inf") or time.perf_counter() - begun < TRIAL_SECONDS:
            start = time.perf_counter()
            made = []
            for stream in streams:
                with mx.stream(stream):
                    made += [a @ b for a, b in pairs] + [heads[0] @ heads[1] for _ in range(4)]
            mx.eval(made)
            best = min(best, time.perf_counter() - start)
    return flops / best / 1e9

"""The machine: a fast BLAS and an allocator without page faults on Linux, the wired limit on Metal, what the device is.

`prepare` runs on `import mlx_slm`, before anything imports `mlx.core`. Nothing here imports mlx at module level.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import resource
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from mlx_slm.machine import blas as blases

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8

blas: blases.Blas | None = None
"""The library that was loaded in front of MLX's own, or None."""
_blas_library: ctypes.CDLL | None = None
_sharing: list[int] = []
_whole: list[int] = []
"""The threads of the BLAS before anybody shared."""
_sharing_lock = threading.Lock()
"""Threads that each of those asks of the BLAS which share the cores now: it has one number for the whole process."""


@functools.cache
def prepare() -> None:
    """Load a fast CBLAS and set the allocator. On macOS and for later calls: nothing."""
    global blas, _blas_library
    if sys.platform != "linux" or any(map(_installed, ("mlx-cuda-13", "mlx-cuda-12", "mlx-cuda"))):
        return
    if "mlx.core" in sys.modules:
        warnings.warn("import mlx_slm before mlx: matrix products are up to 30x slower on a CPU now", stacklevel=3)
        return
    _set_allocator()
    _vectorise_loops()
    os.environ.setdefault("MKL_DYNAMIC", "FALSE")
    # How far MLX looks for work that can run beside other work: at its default of 20 the lanes run one after the other.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "200")
    blas, _blas_library = blases.load(blases.find(cores()))


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _set_allocator() -> None:
    """Keep freed buffers in the process: MLX on Linux would page-fault every large one back in at each step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
        mallopt(option, value)


def _vectorise_loops() -> None:
    """Let MLX find our g++ first, which calls the real one with the flags of this processor: an exp takes 0.9 in place
    of 2.7 ns (docs/decisions.md)."""
    ours, path = str(Path(__file__).parent / "native"), os.environ.get("PATH", os.defpath)
    if ours not in path.split(os.pathsep) and shutil.which("g++"):
        os.environ["PATH"] = os.pathsep.join([ours, path])


def notices() -> list[str]:
    """What slows this machine down, one sentence each with its fix. Commands that compute show them once."""
    if sys.platform != "linux" or backend() != "cpu":
        return []
    sentences = []
    if not blas:
        sentences.append(
            "no fast BLAS found, matrix products are 30x slower: pip install scipy-openblas32 (x86-64, needs g++), "
            "or apt install libopenblas0-pthread, or set MLX_SLM_BLAS to a CBLAS library"
        )
    if not shutil.which("g++"):
        sentences.append("no g++ found, so mx.compile does nothing on this CPU: install g++ for 5-20 % more speed")
    return sentences


def configure_device() -> None:
    """Wire as much memory as Metal recommends, so that weights are not paged; nothing on other backends, or with
    $MLX_SLM_WIRED=0 (docs/gpu.md: several processes that each wire the memory of one machine can bring it down)."""
    import mlx.core as mx

    if backend() == "metal" and os.environ.get("MLX_SLM_WIRED") != "0":
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))


@functools.cache
def backend() -> str:
    """'metal', 'cuda' or 'cpu': where MLX runs by default."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def on_gpu() -> bool:
    """Whether computations take the form that fits a GPU: bf16, one stream, MLX's own fused kernels, large chunks.

    $MLX_SLM_AS_GPU=1 asks for that form on a CPU, to test it (docs/gpu.md).
    """
    return backend() != "cpu" or os.environ.get("MLX_SLM_AS_GPU") == "1"


def release_cache() -> None:
    """Give a GPU's cached buffers back after work of other shapes than what follows."""
    import mlx.core as mx

    if backend() != "cpu":
        mx.clear_cache()


_of_thread = threading.local()


def lanes() -> list:
    """Streams that share the rows of a batch, of this thread alone: MLX binds a stream to the thread that made it. Two
    on a Linux CPU, where MLX works on element-wise operations with one thread per stream (measured on two cores:
    1.3x); one elsewhere."""
    import mlx.core as mx

    if not hasattr(_of_thread, "lanes"):
        more = [mx.new_stream(mx.cpu)] if sys.platform == "linux" and backend() == "cpu" and cores() > 1 else []
        _of_thread.lanes = [mx.default_stream(mx.default_device()), *more]
    return _of_thread.lanes[:1] if on_gpu() else _of_thread.lanes


@contextlib.contextmanager
def sharing_cores(lanes_used: int) -> Iterator[None]:
    """While lanes run side by side, give the products of each its part of the cores, so that they do not compete."""
    known = next((names for names in blases.THREADS.items() if hasattr(_blas_library, names[0])), None)
    if lanes_used < 2 or known is None:
        yield
        return
    setter, getter = (getattr(_blas_library, name) for name in known)
    threads = max(1, cores() // lanes_used)
    with _sharing_lock:
        if not _sharing:
            _whole[:] = [getter()]
        _sharing.append(threads)
        setter(min(_whole + _sharing))
    try:
        yield
    finally:
        with _sharing_lock:
            _sharing.remove(threads)
            setter(min(_whole + _sharing))


def in_lanes(batches: Iterable, compute: Callable) -> Iterator[tuple]:
    """Yield (batch, compute(lane, batch)) in order; `compute` builds arrays, a batch for each lane at a time.

    The batches of a round are evaluated together (one after the other they would not overlap: MLX queues few operations
    ahead), and a round is in flight while the results of the one before it are used.
    """
    import mlx.core as mx

    streams, batches = lanes(), iter(batches)
    before: tuple = ()
    with sharing_cores(len(streams)):
        while round_ := list(zip(range(len(streams)), batches, strict=False)):
            results = []
            for lane, batch in round_:
                with mx.stream(streams[lane]):
                    results.append(compute(lane, batch))
            mx.async_eval(results)
            yield from before
            before = tuple(zip((batch for _, batch in round_), results, strict=True))
        yield from before


def compute_dtype():
    """fp32 on a CPU, where bf16 products are a scalar loop (40x slower); bf16 on a GPU."""
    import mlx.core as mx

    return mx.bfloat16 if on_gpu() else mx.float32


def memory_bytes() -> int:
    """Memory that a model can use: the device's on a GPU, else the machine's, or less where this process has a limit
    (RLIMIT_AS beyond what it has mapped, a container's)."""
    import mlx.core as mx

    info = mx.device_info() if backend() != "cpu" else {}
    size = info.get("max_recommended_working_set_size") or info.get("total_memory") or info.get("memory_size")
    if size:
        return int(size)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    if own != resource.RLIM_INFINITY:
        limits.append(max(0, own - _mapped_bytes()))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(file).read_text()))
    return min(limits)


def _mapped_bytes() -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def end_with(parent: int) -> None:
    """End this process within a second of the one that started it, however that ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def device_name() -> str:
    """The chip's name as its maker writes it, with the number of cores for a CPU."""
    import mlx.core as mx

    if backend() != "cpu":
        return str(mx.device_info().get("device_name", backend()))
    return f"{_processor()}, {cores()} core{'s' if cores() > 1 else ''}"


def _processor() -> str:
    return blases.processor().get("model name") or platform.processor() or platform.machine()


PEAK_SECONDS = 0.5


@functools.cache
def matmul_gflops() -> float:
    """GFLOP/s of square products in the compute dtype, several in one evaluation, the best of half a second: the peak
    that MFU is measured against. The products are so large that starting them does not count."""
    import mlx.core as mx

    size = 4096 if backend() != "cpu" else 1024
    a, b = (mx.random.normal((size, size), key=mx.random.key(i)).astype(compute_dtype()) for i in range(2))
    mx.eval(a, b, a @ b)
    begun = time.perf_counter()
    mx.eval(a @ b)
    together = max(1, min(8, int(0.05 / (time.perf_counter() - begun))))
    best = float("inf")
    while best == float("inf") or time.perf_counter() - begun < PEAK_SECONDS:
        start = time.perf_counter()
        mx.eval([a @ b for _ in range(together)])
        best = min(best, time.perf_counter() - start)
    release_cache()
    return 2 * size**3 * together / best / 1e9


def likely_flops() -> float:
    """FLOP/s that training reaches about, from the measured matrix product: MFU is 0.2 to 0.6 (docs/decisions.md)."""
    return 0.3e9 * matmul_gflops()


def same_blas() -> dict[str, str]:
    """Environment for a process that is to compute with the BLAS of this one, without a trial of its own."""
    return {blases.VARIABLE: blas.path if blas else blases.NONE} if sys.platform == "linux" else {}


PARENT = "MLX_SLM_PARENT"
"""The variable that makes a process end when the one of this number does."""


def arithmetic() -> str:
    """What computes products: the BLAS on a CPU, else the backend. With another one the last digits are others."""
    return (blas.name if blas else "MLX's own BLAS") if backend() == "cpu" else backend()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    packages = ("mlx-slm", "mlx", "mlx-lm", "numpy", "sentencepiece", "tokenizers", "datasets")
    installed = {"python": platform.python_version()}
    for package in packages:
        installed[package] = metadata.version(package) if _installed(package) else "not installed"
    return installed


def describe() -> dict:
    """Return `{"backend", "device", "memory_gb", "blas", "blas_measured", "gflops", "versions"}`.

    `blas_measured`: GFLOP/s of each BLAS that was there to choose from, by name, in a trial.
    """
    return {
        "backend": backend(),
        "device": device_name(),
        "memory_gb": round(memory_bytes() / 2**30, 1),
        "blas": (f"{blas.name} ({blas.path})" if blas else "MLX's own") if backend() == "cpu" else None,
        "blas_measured": blas.measured if blas else {},
        "gflops": round(matmul_gflops(), 1),
        "versions": versions(),
    }

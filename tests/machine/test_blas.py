"""The BLAS in front of MLX's own: found, made, measured once, and the same bits wherever a buffer lies."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest

from mlx_slm.machine import blas, runtime

CANDIDATES = blas.candidates() if sys.platform == "linux" and runtime.backend() == "cpu" else {}
pytestmark = pytest.mark.skipif(not CANDIDATES, reason="a BLAS is chosen on Linux CPUs, from those that are there")

PLACES = [(0, 0, 0), (16, 0, 0), (0, 16, 0), (0, 0, 16), (48, 32, 16), (8, 8, 8), (4, 12, 60), (40, 24, 56)]
"""Bytes beyond a multiple of 64 that the two factors and the product begin at."""
SHAPES = [(256, 704, 256), (8, 333, 24), (512, 64, 128), (128, 128, 64), (33, 17, 65), (4, 32, 5000), (1, 1, 5000)]
SHAPES += [(8192, 128, 64), (64, 128, 8192)]
BITS = """
import ctypes, hashlib, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
threads = next(getattr(library, n) for n in ("MKL_Set_Num_Threads", "openblas_set_num_threads") if hasattr(library, n))
i, f, p = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
library.cblas_sgemm.argtypes = [i] * 6 + [f, p, i, p, i, f, p, i]
rng = np.random.default_rng(0)

def placed(x, offset):
    raw = np.zeros(x.nbytes + 128, np.uint8)
    first = -raw.ctypes.data % 64 + offset
    view = raw[first : first + x.nbytes].view(np.float32).reshape(x.shape)
    view[...] = x
    return view

pool = ThreadPoolExecutor(2)
for count, at_once in ((1, 1), (2, 1), (1, 2)):
    threads(count)
    for m, n, k in {shapes}:
        for turned in range(4):
            a = rng.standard_normal((k, m) if turned & 1 else (m, k)).astype(np.float32)
            b = rng.standard_normal((n, k) if turned & 2 else (k, n)).astype(np.float32)
            def product(at):
                x, y, z = map(placed, (a, b, np.zeros((m, n), np.float32)), at)
                library.cblas_sgemm(
                    101, 111 + (turned & 1), 111 + (turned >> 1), m, n, k,
                    1.0, x.ctypes.data, a.shape[1], y.ctypes.data, b.shape[1], 0.0, z.ctypes.data, n,
                )
                return hashlib.sha256(z.tobytes()).hexdigest()

            found = set(pool.map(product, {places}) if at_once > 1 else map(product, {places} * 2))
            if len(found) > 1:
                print(f"{{m}} x {{k}} x {{n}}, {{count}} threads, {{at_once}} at once: {{len(found)}} results")
"""


@pytest.mark.parametrize("name", list(CANDIDATES))
def test_products_are_the_same_bits_wherever_their_buffers_lie(name):
    """A resumed run has its buffers elsewhere; with this it equals an uninterrupted one: with one thread or two, and
    where two lanes call at once."""
    script = BITS.format(shapes=SHAPES, places=PLACES)
    done = subprocess.run([sys.executable, "-c", script, CANDIDATES[name]], capture_output=True, text=True, check=True)
    assert done.stdout == ""


LINEAR_ALGEBRA = """
import mlx_slm, mlx.core as mx, numpy as np
from mlx_slm.machine import runtime
print(runtime.blas.name)
x = mx.random.normal((40, 40), key=mx.random.key(0))
a, cpu = x @ x.T + 40 * mx.eye(40), mx.cpu
exact = np.array(a, np.float64)
values, vectors = mx.linalg.eigh(a, stream=cpu)
lower, inverse = mx.linalg.cholesky(a, stream=cpu), mx.linalg.inv(a, stream=cpu)
q, r = mx.linalg.qr(a, stream=cpu)
u, s, v = mx.linalg.svd(a, stream=cpu)
for found in (lower @ lower.T, vectors * values @ vectors.T, q @ r, (u * s) @ v, mx.linalg.inv(inverse, stream=cpu)):
    assert np.abs(np.array(found) - exact).max() < 1e-2, found
c = (x + 1j * x.T) @ x.astype(mx.complex64)
assert np.abs(np.array(c) - (np.array(x) + 1j * np.array(x).T) @ np.array(x)).max() < 1e-4
"""


@pytest.mark.parametrize("name", list(CANDIDATES))
def test_each_does_all_that_mlx_asks_of_it(name):
    environment = os.environ | {blas.VARIABLE: CANDIDATES[name]}
    done = subprocess.run([sys.executable, "-c", LINEAR_ALGEBRA], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{name}\n", done.stderr


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_the_names_are_those_that_mlx_imports():
    import mlx.core as mx

    library = os.path.join(os.path.dirname(mx.__file__), "lib", "libmlx.so")
    wanted = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True).stdout.split()
    of_blas = {name for name in wanted if name.startswith("cblas_") or (name.endswith("_") and name[0] in "scdz")}
    assert {name for name in of_blas if not name.startswith("__")} == set(blas.NAMES)


def find(cache, **environment) -> dict:
    """What a new process chooses, with this folder for its cache."""
    script = (
        "import json; from mlx_slm.machine.runtime import blas; "
        "print(json.dumps(blas and [blas.name, blas.path, blas.measured]))"
    )
    environment = (
        {k: v for k, v in os.environ.items() if k != blas.VARIABLE} | {"XDG_CACHE_HOME": str(cache)} | environment
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(len(CANDIDATES) < 2, reason="needs two to choose from")
def test_the_fastest_is_taken_and_that_is_remembered(tmp_path):
    name, path, measured = find(tmp_path)
    assert set(measured) == set(CANDIDATES) and max(measured, key=measured.get) == name
    file = tmp_path / "mlx-slm" / "blas.json"
    known = json.loads(file.read_text())
    ((key, numbers),) = known.items()
    slowest = min(numbers, key=numbers.get)
    file.write_text(json.dumps({"another machine": {}, key: numbers | {slowest: 10**9}}))
    assert find(tmp_path)[0] == slowest, "what is remembered counts, nothing is measured again"
    assert find(tmp_path, MLX_SLM_BLAS=path)[:2] == [name, path], "what is named comes first"
    assert find(tmp_path, MLX_SLM_BLAS="none") is None
    file.write_text('{"half a fi')
    assert set(find(tmp_path)[2]) == set(CANDIDATES) and json.loads(file.read_text())
    os.chmod(tmp_path / "mlx-slm", 0o500)
    if not os.access(tmp_path / "mlx-slm", os.W_OK):  # root may write anyway
        file.unlink(missing_ok=True)
        assert find(tmp_path)[0] in CANDIDATES


@pytest.mark.skipif("scipy-openblas32" not in CANDIDATES, reason="needs scipy-openblas32 and g++")
def test_without_a_compiler_the_prefixed_one_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(blas.shutil, "which", lambda _: None)
    assert "scipy-openblas32" not in blas.candidates()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = blas.candidates()["scipy-openblas32"]
    assert made.startswith(str(tmp_path)) and blas.candidates()["scipy-openblas32"] == made
    assert [p.name for p in (tmp_path / "mlx-slm").iterdir()] == [os.path.basename(made)], "no temporary files"


def test_a_library_that_fails_its_trial_is_not_chosen(tmp_path, monkeypatch):
    broken = tmp_path / "libbroken.so"
    broken.write_text("no library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(blas.VARIABLE, raising=False)
    name, path = next(iter(CANDIDATES.items()))
    monkeypatch.setattr(blas, "candidates", lambda: {"broken": str(broken), name: path})
    found = blas.find(2)
    assert found.name == name and found.measured["broken"] == 0 < found.measured[name]


def test_a_trial_that_takes_too_long_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(blas.VARIABLE, raising=False)

    def busy(path):
        raise subprocess.TimeoutExpired("trial", 10)

    monkeypatch.setattr(blas, "_tried", busy)
    monkeypatch.setattr(blas, "candidates", lambda: {"one": "/one", "two": "/two"})
    assert blas.find(2) == blas.Blas("one", "/one", {})
    assert not (tmp_path / "mlx-slm" / "blas.json").exists()
    monkeypatch.setattr(blas, "_tried", lambda path: {"/one": 10.0, "/two": 20.0}[path])
    assert blas.find(2).name == "two"
    monkeypatch.setattr(blas, "processor", lambda: {"model name": "another", "flags": "avx512f"})
    monkeypatch.setattr(blas, "_tried", lambda path: {"/one": 20.0, "/two": 10.0}[path])
    assert blas.find(2).name == "one", "another processor is another key"


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(blas.Path, "home", homeless)
    assert blas.cache().is_relative_to(tempfile.gettempdir())


def test_a_library_beside_python_or_named_to_the_loader_is_found(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / blas.SYSTEM).touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path / 'lib'}")
    assert blas.candidates()["libopenblas"] == str(tmp_path / "lib" / blas.SYSTEM)
    monkeypatch.delenv("LD_LIBRARY_PATH")
    monkeypatch.setattr(blas.sys, "prefix", str(tmp_path))
    assert blas.candidates()["libopenblas"] == str(tmp_path / "lib" / blas.SYSTEM)


def test_those_who_share_the_cores_leave_the_blas_as_it_was(monkeypatch):
    """Two trainings in two threads that end in the order they began."""
    told = []
    monkeypatch.setattr(
        runtime,
        "_blas_library",
        SimpleNamespace(openblas_set_num_threads=told.append, openblas_get_num_threads=lambda: 8),
    )
    monkeypatch.setattr(runtime, "cores", lambda: 8)
    first, second = runtime.sharing_cores(2), runtime.sharing_cores(4)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert told == [4, 2, 2, 8]

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_slm.machine import blas, runtime

LINUX_CPU = sys.platform == "linux" and runtime.backend() == "cpu"


def python(script, **environment):
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=True,
    )


def test_description_is_complete_and_measured():
    found = runtime.describe()
    assert set(found) >= {"backend", "device", "memory_gb", "blas", "gflops", "versions"}
    assert found["backend"] in ("cpu", "metal", "cuda") and found["memory_gb"] > 0.5
    assert found["versions"]["mlx"][0].isdigit() and found["gflops"] == round(runtime.matmul_gflops(), 1) > 1


@pytest.mark.skipif(not LINUX_CPU, reason="a BLAS is preloaded on Linux only")
def test_mlx_before_us_is_warned_about_once():
    script = "import mlx.core, mlx_slm, mlx_slm.machine.runtime as r; r.prepare(); print(r.blas)"
    found = python(script)
    assert found.stdout == "None\n"
    assert found.stderr.count("import mlx_slm before mlx: matrix products are up to 30x slower") == 1


@pytest.mark.skipif(not LINUX_CPU or not runtime.blas, reason="needs a BLAS to name")
def test_the_named_blas_comes_first_and_a_wrong_one_is_named():
    path = runtime.blas.path
    assert python("import mlx_slm.machine.runtime as r; print(r.blas.path)", MLX_SLM_BLAS=path).stdout == path + "\n"
    found = python("import mlx_slm.machine.runtime as r; print(r.blas.path)", MLX_SLM_BLAS="gone.so")
    assert "$MLX_SLM_BLAS=gone.so cannot be loaded" in found.stderr
    assert found.stdout.strip() in blas.candidates().values(), "another one takes its place"


@pytest.mark.skipif(not LINUX_CPU, reason="notices are for Linux CPUs")
def test_notices_name_the_fix(monkeypatch):
    monkeypatch.setattr(runtime, "blas", None)
    monkeypatch.setattr(runtime.shutil, "which", lambda _: None)
    assert [("pip install scipy-openblas32" in n, "install g++" in n) for n in runtime.notices()] == [
        (True, False),
        (False, True),
    ]


NATIVE = str(Path(runtime.__file__).parent / "native")
LOOPS = """
import hashlib, os, sys
import mlx_slm
if sys.argv[1:] == ["plain"]:
    os.environ["PATH"] = os.environ["PATH"].partition(os.pathsep)[2]
import mlx.core as mx
from mlx_slm.models.ops import exp_nonpositive, gelu, swiglu
x, y = (3 * mx.random.normal((1000, 37), key=mx.random.key(i)) for i in range(2))
found = [mx.compile(f)(*a) for f, a in ((swiglu, (x, y)), (gelu, (x,)), (exp_nonpositive, (-mx.abs(x),)))]
print(hashlib.sha256(b"".join(bytes(memoryview(a)) for a in found)).hexdigest())
"""


@pytest.mark.skipif(not LINUX_CPU or not shutil.which("g++"), reason="MLX calls g++ on a Linux CPU only")
@pytest.mark.skipif(os.environ.get("PATH", "").endswith(NATIVE), reason="ours was put behind the real one on purpose")
def test_loops_for_this_processor_give_the_bits_of_plain_ones(tmp_path):
    """MLX keeps compiled loops in the temporary directory, so each form gets its own."""
    assert os.environ["PATH"].split(os.pathsep).count(NATIVE) == 1
    assert shutil.which("g++") == f"{NATIVE}/g++", "it can be run"
    found = []
    for form in ("native", "plain"):
        (tmp_path / form).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", LOOPS, form],
            env=os.environ | {"TMPDIR": str(tmp_path / form)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert list((tmp_path / form).rglob("*.so")), "g++ was called"
        found.append(done.stdout)
    assert found[0] == found[1]


@pytest.mark.skipif(not LINUX_CPU, reason="MLX calls g++ on a Linux CPU only")
def test_without_a_compiler_ours_gives_up():
    for path in (NATIVE, f"{NATIVE}:/nowhere", f"/nowhere:{NATIVE}:/nowhere"):
        assert subprocess.run([f"{NATIVE}/g++", "--version"], env={"PATH": path}, capture_output=True).returncode == 127


@pytest.mark.skipif(not LINUX_CPU or not runtime.blas or runtime.on_gpu(), reason="fp32 and a preloaded BLAS")
def test_the_preloaded_blas_is_the_one_that_multiplies():
    """mlx's reference BLAS reaches 5 GFLOP/s on such machines; a preloaded one ten times that, and beside another test
    still twice."""
    assert runtime.matmul_gflops() > 12


def test_lanes_give_the_same_sums_as_one_stream():
    a, b = (mx.random.normal((64, 64), key=mx.random.key(i)) for i in range(2))
    mx.eval(a, b)
    with runtime.sharing_cores(len(runtime.lanes())):
        found = []
        for stream in runtime.lanes():
            with mx.stream(stream):
                found.append(a @ b)
        mx.eval(found)
    assert all(mx.allclose(x, a @ b, rtol=1e-5, atol=1e-5) for x in found)


def test_wiring_memory_can_be_refused(monkeypatch):
    wired = []
    monkeypatch.setattr(runtime, "backend", lambda: "metal")
    monkeypatch.setattr(mx, "device_info", lambda *_: {"max_recommended_working_set_size": 3 << 30})
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    runtime.configure_device()
    monkeypatch.setenv("MLX_SLM_WIRED", "0")
    runtime.configure_device()
    assert wired == [3 << 30]


@pytest.mark.skipif(
    not LINUX_CPU or not runtime.blas or runtime.cores() < 2, reason="needs a preloaded BLAS and 2 cores"
)
def test_sharing_cores_ends_as_it_began(monkeypatch):
    told, whole = [], runtime.cores()
    library = SimpleNamespace(MKL_Set_Num_Threads=told.append, MKL_Get_Max_Threads=lambda: whole)
    monkeypatch.setattr(runtime, "_blas_library", library)
    with runtime.sharing_cores(2):
        with runtime.sharing_cores(2):
            pass
        assert told[-1] == runtime.cores() // 2, "the training around an evaluation goes on with its share"
    assert told[-1] == runtime.cores()
    whole = 1  # as with OMP_NUM_THREADS=1: no product before or after has other bits
    with runtime.sharing_cores(2):
        assert told[-1] == 1
    assert told[-1] == 1


def test_every_thread_has_streams_of_its_own():
    """MLX binds a stream to the thread that made it."""

    def compute():
        return [value.item() for _, value in runtime.in_lanes(range(4), lambda lane, batch: mx.array(batch) * 10)]

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(compute).result(timeout=60) for _ in range(2)]
    assert found == [compute()] * 2 == [[0, 10, 20, 30]] * 2


def test_in_lanes_gives_each_batch_its_result_in_order():
    seen = []

    def compute(lane, batch):
        seen.append(batch)
        return mx.array(batch) * 10 + lane * 0

    found = [(batch, value.item()) for batch, value in runtime.in_lanes(range(7), compute)]
    assert found == [(i, 10 * i) for i in range(7)] and seen == list(range(7))
    assert list(runtime.in_lanes([], compute)) == []

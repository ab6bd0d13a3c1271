"""scripts/setup.sh on systems that are imitated by commands of the same names."""

import os
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "scripts" / "setup.sh"


def imitated(tmp_path: Path, script: str, **commands: str) -> subprocess.CompletedProcess:
    """Run `script` after setup.sh where each of `commands` prints the given text, or is the given script."""
    for name, text in commands.items():
        file = tmp_path / name.replace("_", "-")
        file.write_text(text if text.startswith("#!") else f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        file.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    return subprocess.run(
        ["sh", "-euc", f". {SETUP}; {script}", str(SETUP)],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize(
    ("commands", "said"),
    [
        ({"uname": "Darwin", "sysctl": "1"}, ""),
        ({"uname": "Darwin", "sysctl": "1", "sw_vers": "13.6.9"}, "MLX needs macOS 14 or newer, this is 13.6.9"),
        ({"uname": "Darwin", "sysctl": "0"}, "this one has an Intel processor"),
        ({"uname": "Linux", "getconf": "glibc 2.35"}, ""),
        ({"uname": "Linux", "getconf": "glibc 2.41"}, ""),
        ({"uname": "Linux", "getconf": "glibc 2.4"}, "MLX needs glibc 2.35 or newer"),
        ({"uname": "Linux", "getconf": "glibc 2.31"}, "MLX needs glibc 2.35 or newer"),
        ({"uname": "Linux", "getconf": "undefined"}, "this system has another C library"),
    ],
)
def test_one_sentence_for_what_mlx_does_not_run_on(commands, said, tmp_path):
    files = {"sw_vers": "15.1"} | commands
    if "sw_vers" in files:
        (tmp_path / "sw_vers").write_text(f"#!/bin/sh\necho {files.pop('sw_vers')}\n")
        (tmp_path / "sw_vers").chmod(0o755)
    done = imitated(tmp_path, "check_system", **files)
    assert (done.returncode == 0) == (not said) and said in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == bool(said)


@pytest.mark.parametrize(
    ("driver", "packages"),
    [
        ("580.65.06", "-e .[cuda]"),
        ("590.1", "-e .[cuda]"),
        ("550.54", "-e .[cpu]"),
        ("No devices were found", "-e .[cpu]"),
    ],
)
def test_the_drivers_version_decides_about_cuda(driver, packages, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SLM_NO_MKL", "1")
    done = imitated(tmp_path, "platform_packages", uname="Linux", nvidia_smi=driver)
    assert done.stdout.strip() == packages
    assert ("needs 580 or newer" in done.stderr) == driver.startswith("550")


@pytest.mark.parametrize(("intel", "packages"), [(True, "-e .[cpu,mkl]"), (False, "-e .[cpu]")])
def test_mkl_is_for_intel(intel, packages, tmp_path, monkeypatch):
    monkeypatch.delenv("MLX_SLM_NO_MKL", raising=False)
    uname = '#!/bin/sh\n[ "$1" = -m ] && echo x86_64 || echo Linux\n'
    done = imitated(
        tmp_path, "platform_packages", uname=uname, grep=f"#!/bin/sh\nexit {int(not intel)}\n", nvidia_smi=""
    )
    assert done.stdout.strip() == packages and ("220 MB" in done.stderr) == intel

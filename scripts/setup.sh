# Sourced by scripts/quickstart and scripts/test: makes .venv and installs the package for this platform.
# `setup EXTRA...` installs the given extras once; a second run installs nothing again.

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv="$root/.venv"

fail() {
    echo "$(basename -- "$0"): $1" >&2
    exit 1
}

find_python() {
    for python in python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$python" >/dev/null 2>&1 &&
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}

make_venv() {
    [ -x "$venv/bin/python" ] && return
    if command -v uv >/dev/null 2>&1; then
        uv venv --quiet --python '>=3.11' "$venv"
    else
        python=$(find_python)
        [ -n "$python" ] || fail "Python 3.11 or newer is needed and was not found: install it from python.org, or install uv, which brings one"
        "$python" -m venv "$venv" || rm -rf "$venv"
        [ -x "$venv/bin/python" ] || fail "$python cannot make a virtual environment: install its venv module (on Debian: apt install python3-venv)"
    fi
}

install() {
    if command -v uv >/dev/null 2>&1; then
        (cd "$root" && uv pip install --quiet --python "$venv/bin/python" "$@")
    else
        (cd "$root" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@")
    fi || fail "the installation failed: read the lines above, check the network, and run the same command again"
}

# Says in one sentence, before pip would say it in many, what MLX does not run on.
check_system() {
    if [ "$(uname -s)" = Darwin ]; then
        macos=$(sw_vers -productVersion)
        [ "${macos%%.*}" -ge 14 ] || fail "MLX needs macOS 14 or newer, this is $macos: update the system"
        [ "$(sysctl -n hw.optional.arm64 2>/dev/null || true)" = 1 ] || fail "MLX needs a Mac with Apple silicon (M1 or newer); this one has an Intel processor"
        return
    fi
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | sed -n 's/^glibc //p' || true)
    [ -n "$glibc" ] || fail "MLX needs a Linux with glibc 2.35 or newer (Debian 12, Ubuntu 22.04); this system has another C library"
    [ "$(printf '%s\n' 2.35 "$glibc" | sort -V | head -n 1)" = 2.35 ] || fail "MLX needs glibc 2.35 or newer (Debian 12, Ubuntu 22.04), this system has $glibc: update it"
}

# A Mac can run Python for Intel processors under Rosetta: for that there is no MLX.
check_python() {
    [ "$(uname -s)" = Darwin ] || return 0
    machine=$("$venv/bin/python" -c 'import platform; print(platform.machine())')
    [ "$machine" = arm64 ] || fail "the Python in .venv is for $machine (Rosetta), MLX needs one for arm64: remove .venv, install Python from python.org or with uv, and run this again"
}

# The packages that MLX needs to run on this platform.
platform_packages() {
    if [ "$(uname -s)" != Linux ]; then
        echo '-e .'
        return
    fi
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)
    case ${driver%%.*} in
        '' | *[!0-9]*) ;;
        *)
            if [ "${driver%%.*}" -ge 580 ]; then
                echo '-e .[cuda]'
                return
            fi
            echo "the NVIDIA driver is $driver; MLX's CUDA 13 needs 580 or newer, so this installs for the CPU: update the driver, remove .venv and run this again for the GPU" >&2
            ;;
    esac
    if [ "$(uname -m)" = x86_64 ] && grep -q GenuineIntel /proc/cpuinfo 2>/dev/null && [ -z "${MLX_SLM_NO_MKL:-}" ]; then
        echo "an Intel processor: installing mkl too, a download of 220 MB that is a tenth to a sixth faster here (set MLX_SLM_NO_MKL=1 to do without)" >&2
        echo '-e .[cpu,mkl]'
    else
        echo '-e .[cpu]'
    fi
}

setup() {
    check_system
    make_venv
    check_python
    for extra in base "$@"; do
        mark="$venv/.mlx-slm-$extra"
        if ! cmp -s "$root/pyproject.toml" "$mark"; then
            echo "installing mlx-slm ($extra) into .venv" >&2
            case $extra in
                base) install $(platform_packages) ;;
                *) install -e ".[$extra]" ;;
            esac
            cp "$root/pyproject.toml" "$mark"
        fi
    done
}

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

# The packages that MLX needs to run on this platform.
platform_packages() {
    [ "$(uname -s)" = Linux ] || {
        echo '-e .'
        return
    }
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
        echo '-e .[cuda]'
    elif [ "$(uname -m)" != x86_64 ]; then
        echo '-e .[cpu]'
    elif [ -n "${MLX_SLM_BLAS:-}" ] || (PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null || true) | grep -q 'libopenblas\.so'; then
        echo '-e . mlx[cpu]'
    else
        echo "installing mkl, a fast BLAS: a download of about 220 MB (set MLX_SLM_BLAS or install libopenblas to do without)" >&2
        echo '-e .[cpu]'
    fi
}

setup() {
    make_venv
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

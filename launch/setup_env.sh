#!/bin/sh
# Creates the environment .venv and installs dtrain in it, with FFCV if that can be built:
#
#   launch/setup_env.sh [dev]        `dev` adds the tools for `make test` and `make check`
#
# PYTHON=python3.12 chooses the interpreter. A further call does nothing, unless setup.cfg, pyproject.toml, the
# interpreter or the system packages for FFCV have changed. Missing system packages are installed with apt-get, if the
# user is root on Debian or Ubuntu; otherwise one line names them.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
kind=${1:-run}

say() { echo "setup: $*" >&2; }

# Prints the system packages that are missing. pip builds FFCV from source code, for which it needs them.
missing_for_ffcv() {
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    "$python" -c 'import os, sysconfig as s; exit(not os.path.exists(s.get_path("include") + "/Python.h"))' ||
        echo python3-dev
}

install_system() {
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        return 1
    fi
    say "apt-get install $*"
    apt-get update -qq </dev/null && DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq --yes --no-install-recommends "$@" </dev/null >/dev/null
}

pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check --no-input "$@"; }

wanted() { { "$python" -V; cat setup.cfg pyproject.toml; missing_for_ffcv; } | sha256sum; }

is_ready() { # an environment of the kind `dev` serves for `run` as well
    for stamp in ".venv/ready-$kind" .venv/ready-dev; do
        if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted)" ]; then return 0; fi
    done
    return 1
}

make_venv() {
    "$python" -c 'import ensurepip' 2>/dev/null || install_system python3-venv || {
        say "$python has no venv module; install python3-venv"
        return 1
    }
    "$python" -m venv --clear .venv
    "$python" -V >.venv/made # written last, so that an environment that was left incomplete is created again
}

"$python" -c 'import sys; exit(sys.version_info < (3, 11))' || {
    say "$python is not Python 3.11 or newer; name one that is, as in PYTHON=python3.12"
    exit 1
}
if is_ready; then exit 0; fi
rm -f .venv/ready-*

missing=$(missing_for_ffcv | tr '\n' ' ')
# shellcheck disable=SC2086  # not quoted, because every word is a package
if [ -n "$missing" ] && ! install_system $missing; then
    say "without FFCV, images are read by the memory reader; to have FFCV, install $missing"
fi

[ "$(cat .venv/made 2>/dev/null)" = "$("$python" -V)" ] || make_venv
say "installing dtrain and PyTorch into .venv (several GB and minutes the first time)"
case $kind in
    run) pip install --editable . ;;
    *) pip install --editable ".[$kind]" ;;
esac
if [ -z "$(missing_for_ffcv)" ]; then
    pip install --editable ".[ffcv]" || say "FFCV could not be built; images are read by the memory reader"
fi

wanted >.venv/stamp.partial # renamed when complete, so that an interrupted set-up is not taken for a finished one
mv .venv/stamp.partial ".venv/ready-$kind"

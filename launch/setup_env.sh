#!/bin/sh
# Makes .venv with dtrain in it, and FFCV where it can be built:
#
#   launch/setup_env.sh [dev]        `dev` adds the tools of `make test`
#
# PYTHON=python3.12 chooses the interpreter. A second call does nothing until setup.cfg, pyproject.toml, the interpreter
# or what FFCV needs of the system changes. As root on Debian or Ubuntu, missing system packages are installed by
# apt-get; otherwise one line says which they are.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
kind=${1:-run}

say() { echo "setup: $*" >&2; }

# FFCV comes as source code; this is what its build looks for.
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

is_ready() { # `dev` holds all that `run` does
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
    "$python" -V >.venv/made # last, so that half an environment is made again
}

"$python" -c 'import sys; exit(sys.version_info < (3, 11))' || {
    say "$python is not Python 3.11 or newer; name one that is, as in PYTHON=python3.12"
    exit 1
}
if is_ready; then exit 0; fi
rm -f .venv/ready-*

missing=$(missing_for_ffcv | tr '\n' ' ')
# shellcheck disable=SC2086  # one word a package
if [ -n "$missing" ] && ! install_system $missing; then
    say "without FFCV the memory reader is used; to have FFCV, install $missing"
fi

[ "$(cat .venv/made 2>/dev/null)" = "$("$python" -V)" ] || make_venv
say "installing dtrain and PyTorch into .venv (several GB and minutes the first time)"
case $kind in
    run) pip install --editable . ;;
    *) pip install --editable ".[$kind]" ;;
esac
if [ -z "$(missing_for_ffcv)" ]; then
    pip install --editable ".[ffcv]" || say "FFCV could not be built; without it the memory reader is used"
fi

wanted >.venv/stamp.partial # renamed when whole: an interrupted set-up leaves no stamp
mv .venv/stamp.partial ".venv/ready-$kind"

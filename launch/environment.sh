# shellcheck shell=bash
# Sourced by the launch scripts. Goes to the top of the checkout, makes the virtual environment
# .venv there and installs the package in it, editable. Asks nothing and can be run again: pip is
# called only when setup.py, the interpreter or the place of the checkout has changed.
#
#   prepare_environment PURPOSE   PURPOSE: run, or an extra of setup.py, such as test or tpu
#   $python                       the interpreter of .venv

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$PWD/.venv/bin/python"

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed; set PYTHON to one, such as PYTHON=/opt/python3.11/bin/python3"
}

make_virtual_environment() {
    local base_python
    # Asking for pip, not for the folder, lets a set-up that was interrupted start over.
    if "$python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    base_python=$(find_python)
    echo "Making the virtual environment .venv"
    "$base_python" -m venv --clear .venv ||
        fail "cannot make .venv; on Debian and Ubuntu: apt-get install python3-venv"
}

prepare_environment() {
    local purpose=$1 package=. stamp state
    if [[ $purpose != run ]]; then
        package=".[$purpose]"
    fi
    make_virtual_environment
    stamp=".venv/installed-to-$purpose"
    state=$(cat setup.py launch/environment.sh && "$python" -VV && pwd)
    if [[ -f $stamp && $(<"$stamp") == "$state" ]]; then
        return
    fi
    echo "Installing in .venv what a $purpose needs; the first time this takes some minutes"
    if [[ $purpose == test ]]; then
        # By exact version, so that pip takes a CPU build where one is offered.
        "$python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
    fi
    "$python" -m pip install --quiet --disable-pip-version-check --editable "$package"
    if [[ $purpose == test ]]; then
        # Alone: it asks for torchvision, which has no CPU build for this torch and which no test needs.
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps "open_clip_torch==3.3.0"
    fi
    echo "$state" >"$stamp"
}

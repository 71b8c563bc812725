#!/usr/bin/env bash
# Runs the tests on this machine's CPU, in a process a core, up to four, with what is given
# passed on to pytest:
#
#   bash launch/test.sh [-k WORDS | -m slow | tests/test_FILE.py ...]
#
# With -n 0 it is one process, as --pdb needs. Sets up .venv first, with PyTorch and diffusers,
# which the tests compare with.

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment test
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec "$python" -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile "$@"

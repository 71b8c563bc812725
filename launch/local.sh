#!/usr/bin/env bash
# Tunes the model of the package to the aesthetic reward on this machine:
#
#   bash launch/local.sh [--config.KEY=VALUE ...]
#
# Sets up .venv first. The pictures and the LoRA file are left in runs/emoji_aesthetic; a run that
# was interrupted goes on where it was.

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment run
exec "$python" -m alignprop_jax.train --config=configs/emoji.py:aesthetic \
    --workdir=runs/emoji_aesthetic "$@"

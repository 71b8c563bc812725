#!/usr/bin/env bash
# Tunes the model of the package to the aesthetic reward on this machine:
#
#   bash launch/local.sh [--config.KEY=VALUE ...]
#
# Sets up .venv first. The pictures and the LoRA file are left in runs/emoji_aesthetic; a run that
# was interrupted goes on where it was.

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment run
# XLA leaves cores idle when one device has them all: two devices that share the batch are faster.
if (($(getconf _NPROCESSORS_ONLN) > 1)); then
    export XLA_FLAGS="--xla_force_host_platform_device_count=2 ${XLA_FLAGS:-}"
fi
exec "$python" -m alignprop_jax.train --config=configs/emoji.py:aesthetic \
    --workdir=runs/emoji_aesthetic "$@"

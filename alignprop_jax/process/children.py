"""Processes that end when this one does, however it ends."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignprop_jax.process import signals

_LAUNCHER = Path(__file__).with_name("child.py")


def run_child(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    """Runs a command to its end.

    It is given the signal that ends this program, and ends before it, in order.

    Args:
        options: of `subprocess.Popen`.
    """
    # Isolated, so that it starts within a few milliseconds.
    launcher = [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid())]
    # In a group of its own, or Ctrl-C would signal it a second time.
    process = subprocess.Popen([*launcher, *command], process_group=0, **options)
    try:
        with signals.deferred(process.send_signal):
            output, errors = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)

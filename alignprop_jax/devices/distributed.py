"""Several processes as one run: one on each host of a TPU pod or of a cluster.

All of them run the same program and take part in every computation and checkpoint. The main one,
process 0, alone writes files and prints.
"""

import contextlib
import functools
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignprop_jax.errors import UserError
from alignprop_jax.process import signals

Function = TypeVar("Function", bound=Callable)

# JAX reads the first itself. Cloud TPU pods need none of them.
ADDRESS, COUNT, ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# A process that has not been heard of for so long is dead, and the others end.
_HEARTBEAT_TIMEOUT_SECONDS = 30


def initialize() -> None:
    """Connects this process with those on the other hosts; on one host alone, does nothing.

    To be called before JAX is asked for devices. A Cloud TPU host knows its pod. Elsewhere three
    environment variables say who takes part: JAX_COORDINATOR_ADDRESS, the host of process 0 and a
    free port there, as HOST:PORT; JAX_NUM_PROCESSES; and JAX_PROCESS_ID, from 0 on.

    Raises:
        UserError: some of the variables are there and others not, or one cannot be what it says.
    """
    given = [name for name in (ADDRESS, COUNT, ID) if os.environ.get(name)]
    # JAX's own would take SIGTERM over.
    jax.config.update("jax_enable_preemption_service", False)
    if given:
        num_processes, process_id = _read_variables(given)
        jax.distributed.initialize(
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS,
        )
    elif "tpu" in (jax.config.jax_platforms or ""):
        # JAX sets the platform when it is imported on a TPU host; there, it finds the pod, too.
        # It raises ValueError where a TPU is not part of one.
        with contextlib.suppress(ValueError):
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS)


def _read_variables(given: list[str]) -> tuple[int, int]:
    """How many processes take part, and which this one is."""
    missing = [other for other in (ADDRESS, COUNT, ID) if other not in given]
    if missing:
        raise UserError(f"{', '.join(given)} is set without {', '.join(missing)}; set all or none")
    address = os.environ[ADDRESS]
    match = re.fullmatch(r"[!-~]+:(\d{1,5})", address, re.ASCII)
    if match is None or not 0 < int(match[1]) < 2**16:
        raise UserError(f"{ADDRESS}={address!r} must be HOST:PORT, with a port from 1 to 65535")
    count = _read_number(COUNT, 1, 2**31 - 1)
    return count, _read_number(ID, 0, count - 1)


def _read_number(name: str, least: int, most: int) -> int:
    text = os.environ[name]
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or not least <= int(text) <= most:
        raise UserError(f"{name}={text!r} must be a number from {least} to {most}")
    return int(text)


def on_every_host(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Makes `main(argv)` of a program one that several processes can run together.

    They end together. Where one fails, it says why and goes at once, and the others notice.
    """

    def run(argv: list[str]) -> None:
        initialize()
        if not jax.distributed.is_initialized():
            return main(argv)
        try:
            with open(os.devnull, "w") as nowhere:
                with contextlib.redirect_stdout(sys.stdout if is_main() else nowhere):
                    main(argv)
        except Exception as error:
            _fail(error)
        finally:
            jax.distributed.shutdown()

    return run


def _fail(error: Exception) -> NoReturn:
    """Ends the process without goodbye: it would wait for others, and they wait for it."""
    signals.wait_while_ending()
    name = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, UserError):
        message = f"error: {name}: {' '.join(str(error).split())}"
    else:
        traceback.print_exception(error)
        message = (
            f"error: {name} ends by {type(error).__name__}. If another one ended before, its "
            "output says why. Started again on all hosts, the same command resumes a training run."
        )
    signals.end(message, 1)


def is_main() -> bool:
    """Whether this process writes and speaks for all."""
    # JAX is not asked when there is one alone: it would take hold of the devices to answer.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def on_main(function: Function) -> Function:
    """Makes a function that writes one that does so in the main process, and nothing elsewhere."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs) if is_main() else None

    return call


def from_main(value: Any) -> Any:
    """Returns the main process's value, which JSON can hold, in every process.

    What a process reads from a file may differ from host to host, and what it decides by that must
    not: the others would wait for it in a computation that it never gets to.
    """
    if not jax.distributed.is_initialized():
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    text = np.resize(text, size)
    return json.loads(multihost_utils.broadcast_one_to_all(text).tobytes())


def all_agree(condition: bool) -> bool:
    """Returns whether the condition holds in every process."""
    return not largest(not condition)


def largest(number: int) -> int:
    """Returns the largest of the numbers that the processes give."""
    if not jax.distributed.is_initialized():
        return int(number)
    return int(multihost_utils.process_allgather(np.int32(number)).max())

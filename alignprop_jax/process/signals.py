"""SIGINT and SIGTERM: the first one ends a program in order, the second one at once.

Python runs a handler between two of its own instructions, which is not while XLA compiles. What the
handler raises is lost where it comes up in a callback, such as JAX's of the garbage collector. So
the handler here raises nothing: the interpreter writes the number of a signal to a pipe as it comes
in, and a thread that reads the pipe ends the process.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Launchers such as `timeout` send the same signal to the process and to its group.
_SECONDS_OF_ONE_SIGNAL = 0.2
# A disk or a network that hangs does not keep the process longer.
_SECONDS_TO_END = 10

_lock = threading.Lock()
_received: list[int] = []
# Who is told of the first signal, where it does not end the process.
_deferred_to: Callable[[int], None] | None = None
_last_acts: list[Callable[[], None]] = []
_ending = threading.Lock()
_handled = False


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handles the signals from here on, in the main thread of a program."""
    handle()
    try:
        yield
    finally:
        wait_while_ending()


def handle() -> None:
    """Handles the signals from here on; `handled` does so around all that a program does."""
    global _handled
    if _handled:
        return
    _handled = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def write_again(number, frame) -> None:
        # An event loop may have put its own pipe in the place of this one.
        if signal.set_wakeup_fd(writing, warn_on_full_buffer=False) != writing:
            os.write(writing, bytes([number]))

    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # A shell ignores SIGINT for commands in the background. That stays.
    numbers = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, write_again) for number in numbers}

    def forget() -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)

    # A process that is forked off has this one's pipe, and not its thread.
    os.register_at_fork(after_in_child=forget)
    threading.Thread(target=_read, args=(reading,), name="signals", daemon=True).start()


def at_end(act: Callable[[], None]) -> None:
    """Has `act` called before a signal ends the process; the last one given is the first called.

    The main thread is still at work then, and may be anywhere.
    """
    _last_acts.append(act)


@contextlib.contextmanager
def deferred(tell: Callable[[int], None] = lambda number: None) -> Iterator[Callable[[], int]]:
    """Leaves it to this block to end the process when the first signal comes, by an exception.

    A signal that the block has not answered ends the process behind it.

    Args:
        tell: is called with the number of the signal, in another thread.

    Yields:
        A function that returns the number of the signal, 0 as long as there is none.
    """
    global _deferred_to
    _deferred_to = tell
    try:
        yield lambda: _received[0] if _received else 0
    finally:
        with _lock:
            _deferred_to = None
    if _received:
        _end_by(_received[0])


def exit_by(number: int) -> NoReturn:
    """Leaves the program as one that a signal has ended."""
    sys.exit(128 + number)


def end(message: str, status: int) -> NoReturn:
    """Ends the process, in any thread, wherever the others are. The first of several calls does."""
    if not _ending.acquire(blocking=False):
        wait_while_ending()
    deadline = threading.Timer(_SECONDS_TO_END, _leave, [message, status])
    deadline.daemon = True
    deadline.start()
    for act in [*reversed(_last_acts), sys.stdout.flush]:
        with contextlib.suppress(Exception):
            act()
    _leave(message, status)


def wait_while_ending() -> None:
    """Waits for the end, where one has begun: what went wrong since then is of no interest."""
    if _ending.locked():
        threading.Event().wait()


def _end_by(number: int) -> NoReturn:
    end(f"interrupted by {signal.Signals(number).name}", 128 + number)


def _leave(message: str, status: int) -> NoReturn:
    os.write(2, f"{message}\n".encode())
    os._exit(status)


def _read(pipe: int) -> None:
    first = 0.0
    while True:
        number = os.read(pipe, 1)[0]
        if number not in _SIGNALS:
            continue
        with _lock:
            _received.append(number)
            tell = _deferred_to
        if len(_received) == 1:
            first = time.monotonic()
            # In a thread of its own, as this one waits for the second signal.
            act = tell or _end_by
            threading.Thread(target=act, args=(number,), name="end", daemon=True).start()
        elif time.monotonic() - first > _SECONDS_OF_ONE_SIGNAL:
            os._exit(128 + number)

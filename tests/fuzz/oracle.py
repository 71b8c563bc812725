"""What every reader of foreign input owes: a result that is right, or a line that says why not."""

import contextlib
import io
import os
import resource
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alignprop_jax.errors import UserError

SECONDS = 10
MEMORY = 2**30
LONGEST_LINE = 1000
_PACKAGE = f"{os.sep}alignprop_jax{os.sep}"


class Failure(Exception):
    """What a reader did instead.

    Attributes:
        kind: "traceback", "hang", "memory", "line" for an error that is no such line, or "wrong"
            for a result that is not right.
        place: the innermost line of the package, where there is one.
    """

    def __init__(self, kind: str, detail: str, place: str = ""):
        super().__init__(f"{kind} at {place}: {detail}" if place else f"{kind}: {detail}")
        self.kind, self.detail, self.place = kind, detail, place


class _Hang(BaseException):
    """No `Exception`, so that no reader takes it for a property of its input."""


def judge(
    read: Callable[[], Any], check: Callable[[Any], None], culprits: Sequence[str] = ()
) -> str:
    """Returns "result" or "error", by what `read()` did.

    Args:
        read: reads the input.
        check: raises AssertionError for a result that is not right.
        culprits: of which an error has to name one; any error will do without.

    Raises:
        Failure: it did something else, or took more than 10 s or 1 GB.
    """
    try:
        with _bounded():
            result = read()
    except UserError as error:
        _check_line(error, culprits)
        return "error"
    except KeyboardInterrupt:
        raise
    except _Hang as error:
        raise Failure("hang", f"more than {SECONDS} s", _place(error)) from error
    except BaseException as error:  # a SystemExit, or a panic of a library in Rust
        kind = "memory" if isinstance(error, MemoryError) else "traceback"
        detail = f"{type(error).__name__}: {error}"[:300]
        raise Failure(kind, detail, _place(error)) from error
    try:
        check(result)
    except Exception as error:
        raise Failure("wrong", f"{type(error).__name__}: {error}"[:500], "check") from error
    return "result"


def printed(error: UserError) -> str:
    """The line as the programs print it."""
    return " ".join(str(error).split())


def _check_line(error: UserError, culprits: Sequence[str]) -> None:
    line = printed(error)
    place = _place(error)
    if len(line) > LONGEST_LINE:
        raise Failure("line", f"{len(line)} characters: {line[:200]}", place)
    odd = next((c for c in line if not c.isprintable() and not c.isspace()), None)
    if odd is not None:
        raise Failure("line", f"holds {odd!r}: {line[:200]!r}", place)
    if culprits and not any(culprit in line for culprit in culprits):
        raise Failure("line", f"names none of {list(culprits)}: {line[:300]}", place)


def _place(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _PACKAGE in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else ""


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Within, time and memory are bounded, warnings are errors, and what is printed is dropped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("error")
        alarm = threading.current_thread() is threading.main_thread()
        if alarm:
            before = signal.signal(signal.SIGALRM, _ring)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MEMORY, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
            if alarm:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)


def _ring(*_: Any) -> None:
    raise _Hang


def _data_bytes() -> int:
    """The private memory of this process, as the limit counts it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmData:")[2].split(maxsplit=1)[0]) * 1024

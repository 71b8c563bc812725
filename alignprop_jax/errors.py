"""The error a user can cure, what a user should know, and how every program says both."""

import functools
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging


class UserError(Exception):
    """Bad input: one line that names the culprit and the cure."""


@functools.cache
def note(message: str) -> None:
    """Prints, once in a process, what was cut, guessed or left out of what the user gave.

    It goes to the standard output, as all that the main process says for the others.
    """
    print(f"note: {' '.join(message.split())}", flush=True)


def require_file(path: str | Path) -> None:
    """Raises UserError where there is no file that can be read.

    A folder is none, and neither is a pipe or a device, whose end may never come.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: a file belongs here, and this is none")
        open(path, "rb").close()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from error


def run_program(main: Callable[[list[str]], None]) -> None:
    """Parses the flags and runs `main(argv)`, reporting bad input in one line.

    Exits with 2 for a flag or a config key that cannot be used, with 1 for any other `UserError`
    and with 130 when interrupted. Other exceptions are defects and keep their traceback.
    """
    try:
        app.run(main, flags_parser=_parse_flags)
    except UserError as error:
        _exit(f"error: {error}", 1)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        remaining = flags.FLAGS(argv)
    except (flags.Error, UserError) as error:
        _exit(f"error: {error}", 2)
    if len(remaining) > 1:
        _exit(f"error: unexpected argument {remaining[1]!r}; flags are --NAME=VALUE", 2)
    # absl raises the verbosity to INFO otherwise, and libraries bury the program's own lines.
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.ERROR
    return remaining


def _exit(message: str, status: int) -> None:
    print(" ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(status)

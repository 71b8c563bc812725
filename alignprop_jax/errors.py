"""The error a user can cure, what a user should know, and how every program says both."""

import functools
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging

from alignprop_jax.process import signals


class UserError(Exception):
    """Bad input: one line that names the culprit and the cure.

    It stays one line of at most 1,000 characters that can be printed, whatever input it quotes.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(message: str, most: int = 1000) -> str:
    """The message on one line, cut in the middle where it is long; control characters escaped."""
    line = " ".join(message.split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if len(line) <= most:
        return line
    # The culprit stands at the beginning, the cure at the end.
    return f"{line[: most // 2]} ... {line[-most // 3 :]}"


@functools.cache
def note(message: str) -> None:
    """Prints, once in a process, what was cut, guessed or left out of what the user gave.

    It goes to the standard output, as all that the main process says for the others.
    """
    print(f"note: {one_line(message)}", flush=True)


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

    Exits with 2 for a flag or a config key that cannot be used, with 1 for any other `UserError`,
    with 130 after SIGINT and with 143 after SIGTERM. Other exceptions are defects and keep their
    traceback.
    """
    try:
        with signals.handled():
            app.run(main, flags_parser=_parse_flags)
    except UserError as error:
        _exit(f"error: {error}", 1)
    except KeyboardInterrupt:  # By a library that has put back Python's own handler.
        _exit("interrupted by SIGINT", 130)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        remaining = flags.FLAGS(argv)
    except (flags.Error, UserError) as error:
        _exit(f"error: {error}", 2)
    except UnicodeDecodeError as error:
        _exit(f"error: the file of --flagfile is not UTF-8 text ({error.reason})", 2)
    except ValueError as error:
        _exit(f"error: what --flagfile names cannot be opened ({error})", 2)
    except RecursionError:  # absl looks for the known names that are next to one.
        _exit("error: the name of a flag is too long to be one; --help lists them", 2)
    if len(remaining) > 1:
        _exit(f"error: unexpected argument {remaining[1]!r}; flags are --NAME=VALUE", 2)
    # absl raises the verbosity to INFO otherwise, and libraries bury the program's own lines.
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.ERROR
    return remaining


def _exit(message: str, status: int) -> None:
    print(one_line(message), file=sys.stderr, flush=True)
    sys.exit(status)

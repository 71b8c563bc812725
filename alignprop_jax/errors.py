"""The error a user can cure, what a user should know, and how every program says both."""

import functools
import sys
from collections.abc import Callable

from absl import app, flags, logging


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
    print(one_line(message), file=sys.stderr, flush=True)
    sys.exit(status)

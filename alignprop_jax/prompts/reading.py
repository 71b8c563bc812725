"""Prompts from lists and text files."""

import re
from pathlib import Path

from alignprop_jax.errors import UserError
from alignprop_jax.prompts.built_in import BUILT_IN

# A hundred times what the largest lists of prompts in use have.
_MAX_BYTES = 64 * 2**20
# Alone among what Unicode calls a line's end, as editors do; the others are part of a prompt.
_LINE_END = re.compile(r"\r\n|\n|\r")
# Some editors put it in front of a text; files that were joined have it inside.
_BYTE_ORDER_MARK = "\ufeff"


def load_prompts(name_or_path: str) -> list[str]:
    """Returns the prompts of a built-in list (see `built_in`) or of a text file.

    A file is UTF-8 and holds one prompt a line; empty lines and white space around a prompt do not
    count.

    Raises:
      UserError: no such file, it is not text, it is larger than 64 MiB, or it holds no prompt.
    """
    if name_or_path in BUILT_IN:
        return list(BUILT_IN[name_or_path])
    try:
        text = _read_text(name_or_path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"prompts {name_or_path!r} cannot be read ({reason}); "
            f"give a text file with one prompt a line, or one of {', '.join(BUILT_IN)}"
        ) from error
    lines = (line.strip().strip(_BYTE_ORDER_MARK).strip() for line in _LINE_END.split(text))
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"prompts {name_or_path!r} is empty; write one prompt a line")
    return prompts


def _read_text(path: str) -> str:
    """The text of a file; ValueError where it is none."""
    with Path(path).open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"larger than {_MAX_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"not text: a NUL at byte {data.index(0)}; save it as UTF-8")
    return text

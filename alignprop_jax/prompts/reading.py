"""Prompts from lists and text files."""

from pathlib import Path

from alignprop_jax.errors import UserError
from alignprop_jax.prompts.built_in import BUILT_IN


def load_prompts(name_or_path: str) -> list[str]:
    """Returns the prompts of a built-in list (see `built_in`) or of a text file.

    A file holds one prompt a line; empty lines and white space around a prompt do not count.

    Raises:
      UserError: no such file, it is not text, or it holds no prompt.
    """
    if name_or_path in BUILT_IN:
        return list(BUILT_IN[name_or_path])
    try:
        text = Path(name_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            f"prompts {name_or_path!r} cannot be read ({reason}); "
            f"give a text file with one prompt a line, or one of {', '.join(BUILT_IN)}"
        ) from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"prompts {name_or_path!r} is empty; write one prompt a line")
    return prompts

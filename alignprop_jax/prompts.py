"""Prompts: the built-in lists, text files of them, and their token ids."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alignprop_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The animals AlignProp trains on and those it never sees (arXiv 2310.03739).
ANIMALS = tuple(
    """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox
    wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog
    chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo""".split()
)
ANIMALS_UNSEEN = ("snail", "hippopotamus", "cheetah", "crocodile", "lobster", "octopus")

_BUILT_IN = {"animals": ANIMALS, "animals_unseen": ANIMALS_UNSEEN}


def load_prompts(name_or_path: str) -> list[str]:
    """Returns the prompts of a built-in list ("a cat", "an ant", ...) or of a text file.

    A file holds one prompt a line; empty lines and white space around a prompt do not count.

    Raises:
      UserError: no such file, it is not text, or it holds no prompt.
    """
    if name_or_path in _BUILT_IN:
        return [_with_article(noun) for noun in _BUILT_IN[name_or_path]]
    try:
        text = Path(name_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            f"prompts {name_or_path!r} cannot be read ({reason}); "
            f"give a text file with one prompt a line, or {' or '.join(_BUILT_IN)}"
        ) from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"prompts {name_or_path!r} is empty; write one prompt a line")
    return prompts


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """Returns the CLIP tokenizer saved in `folder`.

    Raises:
      UserError: the folder holds no tokenizer.
    """
    # Importing transformers takes seconds that a mistyped flag should not cost.
    from transformers import CLIPTokenizer

    needed = ("tokenizer.json", "vocab.json")
    # transformers makes an empty tokenizer of an empty folder.
    if not any((Path(folder) / name).is_file() for name in needed):
        raise UserError(f"no CLIP tokenizer in {str(folder)!r}; it needs {' or '.join(needed)}")
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"the CLIP tokenizer in {str(folder)!r} cannot be read: {error}") from error


def tokenize(tokenizer: "PreTrainedTokenizerBase", prompts: list[str]) -> np.ndarray:
    """Returns token ids, int32 [B, L], padded or cut to the L tokens the text encoder takes."""
    tokens = tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="np",
    )
    return tokens.input_ids.astype(np.int32)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"

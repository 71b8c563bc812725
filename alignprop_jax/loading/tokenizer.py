"""CLIP tokenizers, and the token ids of prompts."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alignprop_jax.errors import UserError
from alignprop_jax.loading import shapes_only

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: str | Path, pad_token: str | None = None) -> "PreTrainedTokenizerBase":
    """Returns the CLIP tokenizer saved in `folder`; `pad_token` is used in place of its own.

    Raises:
      UserError: the folder holds no tokenizer.
    """
    # Importing transformers takes seconds that a mistyped flag should not cost.
    from transformers import CLIPTokenizer

    needed = ("tokenizer.json", "vocab.json")
    # transformers makes an empty tokenizer of an empty folder.
    if not any((Path(folder) / name).is_file() for name in needed):
        if shapes_only.active():
            return shapes_only.BlankTokenizer(Path(folder))
        raise UserError(f"no CLIP tokenizer in {str(folder)!r}; it needs {' or '.join(needed)}")
    try:
        special = {"pad_token": pad_token} if pad_token else {}
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, **special)
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

"""CLIP tokenizers, and the token ids of prompts."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alignprop_jax.errors import UserError, note
from alignprop_jax.inputs.foreign_json import (
    integer,
    mapping_of,
    number,
    optional,
    read_json_fields,
    read_json_object,
    shorten,
)
from alignprop_jax.loading import shapes_only
from alignprop_jax.nn.clip import CLIPTextConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLIP_LENGTH = 77
"""Tokens of a text that CLIP takes."""

_CONFIG = "tokenizer_config.json"
_JSON_FILES = ("tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json")
_SCHEMA = {"model_max_length": optional(number(2, 1e31, default=None))}
_VOCABULARY = mapping_of(integer(0, 2**31), 10**7)
# transformers writes 1e30 for a length that nobody said.
_NO_LENGTH = 10**6
_NAMED_PROMPTS = 3
_SHOWN_CHARACTERS = 40


def load_tokenizer(
    folder: str | Path, encoder: CLIPTextConfig | None = None, pad_token: str | None = None
) -> "PreTrainedTokenizerBase":
    """Loads the CLIP tokenizer saved in `folder`.

    Its `model_max_length` is the number of tokens that the text encoder gets: what the tokenizer's
    files say, and no more than the encoder has positions for.

    Args:
        encoder: the text encoder that its tokens are for; None where that is not known.
        pad_token: used in place of its own.

    Raises:
        UserError: the folder holds no tokenizer, it is damaged, or it has tokens that the text
            encoder does not know. The message names the file or the folder.
    """
    folder = Path(folder)
    needed = ("tokenizer.json", "vocab.json")
    is_whole = any((folder / name).is_file() for name in needed)
    if not is_whole and not shapes_only.active():
        # transformers makes an empty tokenizer of an empty folder.
        raise UserError(f"no CLIP tokenizer in {str(folder)!r}; it needs {' or '.join(needed)}")
    said = _read_length(folder)
    if not is_whole:
        return shapes_only.BlankTokenizer(_fit_length(said, encoder, folder))
    _check_files(folder)
    # Importing transformers takes seconds that a mistyped flag should not cost.
    from transformers import CLIPTokenizer

    try:
        special = {"pad_token": pad_token} if pad_token else {}
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, **special)
        # A vocabulary that lacks the unknown token is found wanting no sooner.
        tokenizer("a \N{SNOWMAN}", verbose=False)
    except Exception as error:  # both libraries raise whatever a damaged file makes them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the CLIP tokenizer in {str(folder)!r} cannot be read ({reason[:200]}); fetch it again"
        ) from error
    tokenizer.model_max_length = _fit_length(said, encoder, folder)
    _check_tokens(tokenizer, encoder, folder)
    return tokenizer


def tokenize(tokenizer: "PreTrainedTokenizerBase", prompts: list[str]) -> np.ndarray:
    """Returns token ids, int32 [B, L], padded or cut to the L tokens the text encoder takes.

    A note says what is cut.

    Raises:
        UserError: a prompt is no text.
    """
    length = tokenizer.model_max_length
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt {ascii(prompt)} holds bytes that are not UTF-8") from error
    whole = tokenizer(prompts, verbose=False).input_ids
    lost = {
        prompt: len(ids) - length
        for prompt, ids in zip(prompts, whole, strict=True)
        if len(ids) > length
    }
    if lost:
        named = [
            f"{textwrap.shorten(prompt, _SHOWN_CHARACTERS, placeholder='...')!r} loses {tokens}"
            for prompt, tokens in list(lost.items())[:_NAMED_PROMPTS]
        ]
        others = len(lost) - len(named)
        note(
            f"prompts are cut to the {length} tokens that the text encoder takes: "
            f"{', '.join(named)}{f', and {others} more lose some' if others else ''}"
        )
    tokens = tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="np",
    )
    return tokens.input_ids.astype(np.int32)


def _read_length(folder: Path) -> int | None:
    """How many tokens of a text the tokenizer's config says to take; None where it says nothing."""
    path = folder / _CONFIG
    if not path.is_file():
        return None
    said = read_json_fields(path, _SCHEMA)["model_max_length"]
    return None if said is None or said > _NO_LENGTH else int(said)


def _fit_length(said: int | None, encoder: CLIPTextConfig | None, folder: Path) -> int:
    if encoder is None:
        return said or CLIP_LENGTH
    if said and said > encoder.max_length:
        note(
            f"{folder / _CONFIG} has model_max_length={said}, and the text encoder takes "
            f"{encoder.max_length} tokens: {encoder.max_length} it is"
        )
    return min(said or encoder.max_length, encoder.max_length)


def _check_files(folder: Path) -> None:
    for name in _JSON_FILES:
        if not (folder / name).is_file():
            continue
        values = read_json_object(folder / name)
        if name == "vocab.json":
            try:
                _VOCABULARY.parse(values)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{folder / name}: it must be {_VOCABULARY.allowed}; fetch it again"
                ) from error


def _check_tokens(
    tokenizer: "PreTrainedTokenizerBase", encoder: CLIPTextConfig | None, folder: Path
) -> None:
    for name in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"the CLIP tokenizer in {str(folder)!r} has no {name}")
    if encoder is None:
        return
    # transformers gives a special token that the vocabulary lacks a number behind its last.
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= encoder.vocab_size:
        raise UserError(
            f"the CLIP tokenizer in {str(folder)!r} has the token {shorten(token)} with id "
            f"{highest}, and the text encoder knows ids up to {encoder.vocab_size - 1}: they are "
            "not of one model, or the vocabulary lacks the token"
        )

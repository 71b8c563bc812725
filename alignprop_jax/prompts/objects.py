"""Which objects a prompt asks for, and how many of each."""

import re
from typing import NamedTuple

from alignprop_jax.prompts.english import NUMBERS

_NUMBERS = {"a": 1, "an": 1, **{word: number for number, word in NUMBERS.items()}}
# What follows is where the objects are, or what they are like.
_SETTING = re.compile(
    r"\b(?:on|in|at|under|over|near|with|beside|behind|playing|sitting|standing|wearing)\b"
)
_MOST = 10**6
_LIST = re.compile(r",|&|\band\b")


class PromptObject(NamedTuple):
    """An object as the prompt calls it, and how many it asks for; None for "the" and "some".

    Nobody draws a million of anything: that number stands for all that are larger.
    """

    name: str
    number: int | None


def prompt_objects(prompt: str) -> list[PromptObject]:
    """Reads a prompt such as "three dogs and a red cat on a blue background".

    Returns:
        Here [("dogs", 3), ("red cat", 1)]: what is listed before the first word of place or manner,
        without its number or article. Where neither stands, one is meant.
    """
    listed = _SETTING.split(prompt.lower(), maxsplit=1)[0]
    return [found for phrase in _LIST.split(listed) if (found := _read_phrase(phrase))]


def _read_phrase(phrase: str) -> PromptObject | None:
    first, *others = re.findall(r"[\w'-]+", phrase) or [""]
    if not others:
        return PromptObject(first, 1) if first else None
    name = " ".join(others)
    if first in _NUMBERS:
        return PromptObject(name, _NUMBERS[first])
    if first.isdecimal():
        # Python refuses to read thousands of digits.
        return PromptObject(name, min(int(first), _MOST) if len(first) < 20 else _MOST)
    if first in ("the", "some"):
        return PromptObject(name, None)
    return PromptObject(f"{first} {name}", 1)

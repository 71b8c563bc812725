"""Names in place of places: what is shared says which model or file, not where it lay."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

# What may follow a path: a function in a file, or a variant of weights.
_BEHIND = re.compile(r":[^:/\\]*$")


def name_of(text: str) -> str:
    """The last part of what is a path on this machine or in a bucket; any other text as it is.

    "/home/me/models/sd15" is "sd15" and "rewards.py:redness" keeps its function. A hub id, such as
    "owner/name", is a name.
    """
    path = _BEHIND.sub("", text)
    is_place = (
        "://" in text
        or text.startswith(("/", "~", "./", "../"))
        or re.match(r"[A-Za-z]:\\", text) is not None
        or (os.sep in path and os.path.exists(path))
    )
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] if is_place else text


def score_name(score: str) -> str:
    """The name of a score as pages have it: "reward/PART" for a part whose name may be a path."""
    kind, slash, part = score.partition("/")
    return f"{kind}/{name_of(part)}" if slash and kind == "reward" else score


def reward_name(reward: str | Mapping[str, float]) -> str:
    """What a config's reward is called: a name, a function, or a sum of such."""
    if isinstance(reward, str):
        return name_of(reward)
    return " + ".join(f"{weight:g} {name_of(name)}" for name, weight in reward.items())


def header_without_places(header: Mapping[str, str]) -> dict[str, str]:
    """The free entries of a file's header, those that are JSON objects too."""

    def shared(text: str) -> str:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        return json.dumps(without_places(value)) if isinstance(value, dict) else name_of(text)

    return {key: shared(text) for key, text in header.items()}


def without_places(value: Any) -> Any:
    """The same JSON value with `name_of` every string in it, those of keys too."""
    if isinstance(value, str):
        return name_of(value)
    if isinstance(value, Mapping):
        return {name_of(key): without_places(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(inner) for inner in value]
    return value

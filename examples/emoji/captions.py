"""The captions of scenes, and the words they are made of."""

from collections.abc import Sequence

from alignprop_jax.prompts.english import NUMBERS, is_countable, plural, with_article
from examples.emoji.colors import COLORS
from examples.emoji.names import OBJECT_NAMES


def caption(
    names: Sequence[str],
    count: int = 1,
    colors: Sequence[str | None] | None = None,
    background: str | None = None,
) -> str:
    """The caption of a scene.

    Args:
      names: the kinds of object, in reading order.
      count: how many of the kind, 1 to 4; more than 1 for a single kind only.
      colors: for each name a colour word, or None for its natural colours.
      background: a colour word, or None for the white that goes unmentioned.

    Returns:
      Such as "a cat", "three dogs", "a red apple and a blue pear" or "an ant on a pink background".
    """
    phrases = [
        name if color is None else f"{color} {name}"
        for name, color in zip(names, colors or [None] * len(names), strict=True)
    ]
    if count > 1:
        (phrase,) = phrases
        text = f"{NUMBERS[count]} {plural(phrase)}"
    else:
        text = " and ".join(with_article(phrase) for phrase in phrases)
    if background is not None:
        text += f" on {with_article(background)} background"
    return text


def caption_words() -> list[str]:
    """Every word a caption may hold and a few that prompts often add, sorted."""
    phrases = [*OBJECT_NAMES, *(plural(name) for name in OBJECT_NAMES if is_countable(name))]
    grammar = "a an some and on background the of in with photo picture image emoji one white"
    numbers = [NUMBERS[count] for count in range(2, 5)]
    looks = "flat glossy blurry faded noisy"
    words = " ".join([*phrases, *COLORS, *numbers, grammar, looks]).split()
    return sorted(set(words))

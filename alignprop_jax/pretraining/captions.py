"""The English of the captions: articles, plurals, numbers and the words they are made of."""

from collections.abc import Sequence

from alignprop_jax.pretraining.colors import COLORS
from alignprop_jax.pretraining.names import OBJECT_NAMES

NUMBERS = {2: "two", 3: "three", 4: "four"}

_SAME_IN_PLURAL = {"bison", "deer", "fish", "jellyfish", "moose", "pufferfish", "sheep", "shrimp"}
_IRREGULAR_PLURALS = {
    "buffalo": "buffaloes",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "mango": "mangoes",
    "mosquito": "mosquitoes",
    "mouse": "mice",
    "ox": "oxen",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "wolf": "wolves",
}
# Mass nouns and names that are plural already take "some" and cannot be counted.
_UNCOUNTABLE = {
    "bacon", "beans", "beer", "blueberries", "bread", "broccoli", "butter", "champagne", "cheese",
    "cherries", "coffee", "coral", "corn", "curry", "fries", "garlic", "ginger", "grapes", "ice",
    "lettuce", "milk", "pancakes", "peanuts", "popcorn", "ramen", "rice", "soda", "spaghetti",
    "stew", "sushi", "tea",
}  # fmt: skip
_SILENT_VOWELS = {"unicorn"}


def is_countable(phrase: str) -> bool:
    """Whether the noun that ends `phrase` can stand after a number: not so "rice" or "grapes"."""
    return phrase.split()[-1] not in _UNCOUNTABLE


def plural(name: str) -> str:
    """The plural of a countable noun or noun phrase: "cat" -> "cats", "sheep" -> "sheep".

    Raises:
      ValueError: the noun has none ("rice").
    """
    if not is_countable(name):
        raise ValueError(f"{name!r} cannot be counted")
    *modifiers, noun = name.split()
    return " ".join([*modifiers, _plural_noun(noun)])


def _plural_noun(noun: str) -> str:
    if noun in _SAME_IN_PLURAL:
        return noun
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def with_article(phrase: str) -> str:
    """A noun phrase with "a", "an" or, when it cannot be counted, "some" before it."""
    if not is_countable(phrase):
        return f"some {phrase}"
    first_word = phrase.split()[0]
    takes_an = first_word[0] in "aeiou" and first_word not in _SILENT_VOWELS
    return f"{'an' if takes_an else 'a'} {phrase}"


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
    looks = "flat glossy blurry faded noisy"
    words = " ".join([*phrases, *COLORS, *NUMBERS.values(), grammar, looks]).split()
    return sorted(set(words))

"""The English of prompts and captions: articles, plurals and numbers."""

NUMBERS = dict(
    enumerate("one two three four five six seven eight nine ten eleven twelve".split(), start=1)
)

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

"""The prompts that come with the package, to train on and never to train on."""

from collections.abc import Sequence

from alignprop_jax.prompts.english import NUMBERS, plural, with_article

# The animals AlignProp trains on and those it never sees (arXiv 2310.03739).
ANIMALS = tuple(
    """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox
    wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog
    chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo""".split()
)
ANIMALS_UNSEEN = ("snail", "hippopotamus", "cheetah", "crocodile", "lobster", "octopus")

_COLORS = ("red", "blue", "yellow", "green", "pink", "orange", "purple")


def _singles(animals: Sequence[str]) -> tuple[str, ...]:
    return tuple(with_article(animal) for animal in animals)


def _counts(animals: Sequence[str]) -> tuple[str, ...]:
    """Each animal in each number: "two cats", "three cats", "four cats", "two dogs"."""
    return tuple(
        f"{NUMBERS[count]} {plural(animal)}" for animal in animals for count in range(2, 5)
    )


def _with_a_frog(animals: Sequence[str]) -> tuple[str, ...]:
    """Each animal beside a frog, in either order: "a cat and a frog", "a frog and a dog"."""
    names = [with_article(animal) for animal in animals if animal != "frog"]
    return tuple(
        f"{name} and a frog" if index % 2 == 0 else f"a frog and {name}"
        for index, name in enumerate(names)
    )


def _colored_pairs(animals: Sequence[str]) -> tuple[str, ...]:
    """Each animal beside another in another colour: "a red cat and a blue lion"."""
    shift = len(animals) // 4 + 1
    pairs = []
    for index, animal in enumerate(animals):
        first, second = (_COLORS[(index + step) % len(_COLORS)] for step in (0, 1 + index % 3))
        other = animals[(index + shift) % len(animals)]
        pairs.append(f"{with_article(f'{first} {animal}')} and {with_article(f'{second} {other}')}")
    return tuple(pairs)


BUILT_IN = {
    f"{name}{suffix}": make(animals)
    for name, make in {
        "animals": _singles,
        "animal_counts": _counts,
        "animals_with_a_frog": _with_a_frog,
        "colored_pairs": _colored_pairs,
    }.items()
    for suffix, animals in {"": ANIMALS, "_unseen": ANIMALS_UNSEEN}.items()
}
"""Prompts by the name that config.prompts and config.eval_prompts may give."""

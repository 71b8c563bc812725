"""The built-in prompts: no prompt twice, and no animal both trained on and not."""

import re

import pytest

from alignprop_jax.prompts.built_in import ANIMALS, ANIMALS_UNSEEN, BUILT_IN
from alignprop_jax.prompts.objects import prompt_objects

SIZES = {"animals": (45, 6), "animal_counts": (135, 18), "colored_pairs": (45, 6)}
SIZES |= {"animals_with_a_frog": (44, 6)}


def test_animals_are_the_papers():
    assert len(set(ANIMALS)) == 45 and len(set(ANIMALS_UNSEEN)) == 6
    assert not set(ANIMALS) & set(ANIMALS_UNSEEN)


@pytest.mark.parametrize("name", SIZES)
def test_lists(name):
    train, unseen = BUILT_IN[name], BUILT_IN[f"{name}_unseen"]
    assert (len(set(train)), len(set(unseen))) == (len(train), len(unseen)) == SIZES[name]
    words = set(re.findall(r"[a-z]+", " ".join(train)))
    assert not words & set(ANIMALS_UNSEEN)
    for prompt in (*train, *unseen):
        numbers = [thing.number for thing in prompt_objects(prompt)]
        assert sum(numbers) in {"animals": (1,), "animal_counts": (2, 3, 4)}.get(name, (2,))


def test_pairs_are_of_two_animals_and_two_colours():
    for prompt in (*BUILT_IN["colored_pairs"], *BUILT_IN["colored_pairs_unseen"]):
        colors, animals = zip(*(t.name.split() for t in prompt_objects(prompt)), strict=True)
        assert len(set(colors)) == len(set(animals)) == 2
    for prompt in (*BUILT_IN["animals_with_a_frog"], *BUILT_IN["animals_with_a_frog_unseen"]):
        names = [thing.name for thing in prompt_objects(prompt)]
        assert names.count("frog") == 1


def test_words_that_need_care():
    assert "an ant" in BUILT_IN["animals"] and "three mice" in BUILT_IN["animal_counts"]
    assert BUILT_IN["animals_unseen"][-1] == "an octopus"

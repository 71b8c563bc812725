"""What prompts ask for, in words people write."""

import pytest

from alignprop_jax.prompts.objects import prompt_objects


@pytest.mark.parametrize(
    "prompt, objects",
    [
        ("a cat", [("cat", 1)]),
        ("an ant", [("ant", 1)]),
        ("cat", [("cat", 1)]),
        ("three dogs", [("dogs", 3)]),
        ("12 red apples", [("red apples", 12)]),
        ("two cats and a dog", [("cats", 2), ("dog", 1)]),
        ("A cat, two dogs & one bee.", [("cat", 1), ("dogs", 2), ("bee", 1)]),
        ("0012 cats", [("cats", 12)]),
        (f"{10**7} cats", [("cats", 10**6)]),
        (f"{'9' * 5000} cats", [("cats", 10**6)]),
        ("a red cat and a blue dog", [("red cat", 1), ("blue dog", 1)]),
        ("three dogs on a blue background", [("dogs", 3)]),
        ("a panda with two hats", [("panda", 1)]),
        ("the dogs and some rice", [("dogs", None), ("rice", None)]),
        ("sandy-brown horse", [("sandy-brown horse", 1)]),
        ("on a blue background", []),
        ("", []),
    ],
)
def test_objects_and_numbers(prompt, objects):
    assert prompt_objects(prompt) == objects

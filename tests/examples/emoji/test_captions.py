import pytest

from alignprop_jax.prompts.built_in import ANIMALS, ANIMALS_UNSEEN
from examples.emoji.captions import caption, caption_words
from examples.emoji.names import OBJECT_NAMES


def test_every_prompted_animal_has_pictures():
    assert set(OBJECT_NAMES) >= {*ANIMALS, *ANIMALS_UNSEEN}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"names": ["ant"]}, "an ant"),
        ({"names": ["deer"], "count": 3}, "three deer"),
        ({"names": ["wolf"], "count": 2, "colors": ["red"]}, "two red wolves"),
        ({"names": ["cat", "ant"]}, "a cat and an ant"),
        ({"names": ["cat", "dog"], "colors": ["red", None]}, "a red cat and a dog"),
        (
            {"names": ["cat"], "colors": ["orange"], "background": "blue"},
            "an orange cat on a blue background",
        ),
        ({"names": ["fly"], "background": "orange"}, "a fly on an orange background"),
    ],
)
def test_caption(arguments, expected):
    assert caption(**arguments) == expected


def test_caption_words_are_single_lower_case_words():
    words = caption_words()
    assert words == sorted(set(words))
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    assert {"a", "an", "two", "four", "wolves", "tropical", "blue", "background"} <= set(words)

"""What the judges are taught with."""

import jax
import numpy as np
import pytest

from alignprop_jax.evaluation.judges import NOTHING
from alignprop_jax.prompts.built_in import ANIMALS, ANIMALS_UNSEEN
from examples.emoji.judge_pictures import make_pictures
from examples.emoji.names import STYLES
from examples.emoji.sprites import Sprites
from examples.emoji.train_judges import recognizer_lesson, style_lesson


@pytest.fixture(scope="module")
def sprites():
    """Two pictures of a cat in each style, one of every other animal and of an apple."""
    names = ["cat", *ANIMALS, *ANIMALS_UNSEEN, "apple"]
    rows = [(name, style) for name in names for style in STYLES]
    images = np.zeros((len(rows), 64, 64, 4), np.uint8)
    images[:, 16:48, 16:48, 3] = 255
    return Sprites(images, *(tuple(column) for column in zip(*rows, strict=True)))


def test_recognizer_learns_every_animal_in_both_styles(sprites):
    lesson = recognizer_lesson(sprites)
    labels, indices = lesson.draw(np.random.default_rng(0), 20_000)
    empty = lesson.num_empty(20_000)
    assert lesson.classes[-1] == NOTHING and set(labels[-empty:]) == {51}
    assert set(labels[:-empty]) == set(range(51))
    for label, index in zip(labels[:-empty], indices[:-empty], strict=True):
        assert lesson.classes[label] == sprites.names[index]
    # A cat has two pictures of a style; it is drawn no more often than a dog for that.
    counts = np.bincount(labels[:-empty], minlength=51) / len(labels[:-empty])
    np.testing.assert_allclose(counts, 1 / 51, rtol=0.3)
    glossy = np.array([sprites.styles[index] == "glossy" for index in indices])
    np.testing.assert_allclose(glossy.mean(), 0.5, atol=0.02)


def test_style_judge_sees_only_the_names_it_is_given(sprites):
    lesson = style_lesson(sprites, ["cat", "apple"])
    labels, indices = lesson.draw(np.random.default_rng(0), 1000)
    assert {sprites.names[index] for index in indices} == {"cat", "apple"}
    for label, index in zip(labels[: -lesson.num_empty(1000)], indices, strict=False):
        assert lesson.classes[label] == sprites.styles[index]


def test_pictures_show_the_sprite_but_for_the_empty_ones():
    # A black square: dark in the middle of every picture that shows it.
    sprites = np.zeros((24, 64, 64, 4), np.float32)
    sprites[:, 12:52, 12:52, 3] = 1
    compiled = jax.jit(
        make_pictures,
        static_argnums=(2, 3, 4, 5),
        # Compiling is what takes the time.
        compiler_options={"xla_backend_optimization_level": 0},
    )
    pictures = compiled(jax.random.key(0), sprites, 12, 0.3, 1.0, 0.0)
    assert pictures.shape == (24, 64, 64, 3)
    assert 0 <= pictures.min() and pictures.max() <= 1
    middle = np.asarray(pictures)[:, 26:38, 26:38].mean((1, 2, 3))
    assert middle[:12].max() < 0.45
    assert np.median(middle[12:]) > middle[:12].max()

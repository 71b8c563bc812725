"""What the judges of scenes are taught: labels that fit the pictures, and empty pictures."""

import jax
import numpy as np

from alignprop_jax.prompts.built_in import ANIMALS, ANIMALS_UNSEEN
from examples.emoji.judge_pictures import make_scene_pictures
from examples.emoji.scene_judges import animal_label, count_label, draw_labelled
from examples.emoji.scenes import SceneMixture
from tests.synthetic_scenes import make_scenes

MIXTURE = SceneMixture(single=1, count=1, pair=1)


def test_numbers_fit_the_pictures():
    """The more discs of half the size, the darker the picture."""
    rng = np.random.default_rng(0)
    images, labels = draw_labelled(make_scenes(MIXTURE), count_label, 200, rng)
    assert images.shape == (200, 64, 64, 3)
    assert labels[-20:].tolist() == [0] * 20 and set(labels[:-20]) == {1, 2, 3, 4}
    dark = 1 - images[:-20].mean((1, 2, 3)) / 255
    means = [dark[labels[:-20] == number].mean() for number in (2, 3, 4)]
    assert means == sorted(means)


def test_animals_are_those_of_the_caption():
    scenes, rng = make_scenes(MIXTURE), np.random.default_rng(3)
    drawn = [scenes.scene(rng) for _ in range(50)]
    scene = next(scene for scene in drawn if "cat" in scene.factors["names"])
    label = dict(zip((*ANIMALS, *ANIMALS_UNSEEN), animal_label(scene), strict=True))
    assert label["cat"] == 1 and label["dog"] == 0
    assert sum(label.values()) == sum(name in label for name in scene.factors["names"])
    assert not animal_label(None).any()


def test_empty_pictures_show_no_object():
    scenes = np.ones((8, 64, 64, 3), np.float32)
    scenes[:, 20:44, 20:44] = 0
    compiled = jax.jit(
        make_scene_pictures,
        static_argnums=(2, 3, 4),
        # Compiling is what takes the time.
        compiler_options={"xla_backend_optimization_level": 0},
    )
    pictures = np.asarray(compiled(jax.random.key(0), scenes, 4, 0.3, 0.7))
    assert 0 <= pictures.min() and pictures.max() <= 1
    middle, edge = pictures[:, 28:36, 28:36].mean((1, 2, 3)), pictures[:, :8, :8].mean((1, 2, 3))
    assert (edge[:4] - middle[:4] > 0.5).all()
    assert (np.abs(edge[4:] - middle[4:]) < 0.5).all()

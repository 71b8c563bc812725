"""Training the judges of scenes: how many objects there are, and which animals are among them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from alignprop_jax.evaluation.judges import COUNTS, IMAGE_SIZE, ConvClassifier, Judge
from alignprop_jax.prompts.built_in import ANIMALS, ANIMALS_UNSEEN
from examples.emoji.fit import Recipe, fit
from examples.emoji.judge_pictures import make_scene_pictures
from examples.emoji.scenes import Scene, SceneMixture, SceneSampler
from examples.emoji.sprites import Sprites

_SEED = 2753  # of no other part of the project
_MIXTURE = SceneMixture(single=0.25, count=0.45, pair=0.25, colored_pair=0.05)
_ANIMALS = (*ANIMALS, *ANIMALS_UNSEEN)
_HUE, _DAMAGE = 0.3, 0.7
_EMPTY_SHARE = 0.1

# Labels of a scene, or of a picture without an object.
Label = Callable[[Scene | None], np.ndarray]
Loss = Callable[[Float[Array, "b n"], Array], Float[Array, " b"]]


def train_counter(sprites: Sprites, workdir: Path, output: Path) -> dict[str, Any]:
    """Trains the judge of numbers and writes it; returns its entry in `config.json`."""
    loss = optax.softmax_cross_entropy_with_integer_labels
    judge = _train("counter", COUNTS, count_label, loss, sprites, workdir, output)
    pictures, wanted = _examination(sprites, count_label)
    right = np.array(judge.classify(pictures)) == np.array(COUNTS)[wanted]
    shares = {name: _mean(right[wanted == number]) for number, name in enumerate(COUNTS)}
    return {"classes": COUNTS, "accuracy": shares}


def train_finder(sprites: Sprites, workdir: Path, output: Path) -> dict[str, Any]:
    """Trains the judge of what is there and writes it; returns its entry in `config.json`."""

    def loss(logits, labels):
        return optax.sigmoid_binary_cross_entropy(logits, labels).sum(-1)

    judge = _train("finder", _ANIMALS, animal_label, loss, sprites, workdir, output)
    pictures, wanted = _examination(sprites, animal_label)
    found, there = judge.find(pictures), wanted == 1
    accuracy = {"there": _mean(found[there]), "not_there": _mean(~found[~there])}
    return {"classes": _ANIMALS, "accuracy": accuracy}


def count_label(scene: Scene | None) -> np.ndarray:
    """The number of objects, int []."""
    return np.array(scene.factors["count"] if scene else 0)


def animal_label(scene: Scene | None) -> np.ndarray:
    """1 for every animal of the built-in prompts that is there, float32 [51]."""
    names = scene.factors["names"] if scene else ()
    return np.array([name in names for name in _ANIMALS], np.float32)


def draw_labelled(
    scenes: SceneSampler, label: Label, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Scenes, uint8 [size, 64, 64, 3], the last of which are to show nothing, and their labels."""
    drawn = [scenes.scene(rng) for _ in range(size)]
    shown = [*drawn[: size - _num_empty(size)], *[None] * _num_empty(size)]
    return np.stack([scene.image for scene in drawn]), np.stack([label(scene) for scene in shown])


def _train(
    name: str,
    classes: tuple[str, ...],
    label: Label,
    loss: Loss,
    sprites: Sprites,
    workdir: Path,
    output: Path,
) -> Judge:
    """Trains and writes one judge, all but its head from the features that tell animals."""
    model = ConvClassifier(len(classes))
    scenes = SceneSampler(sprites, _MIXTURE)
    recipe = Recipe(1500, batch_size=64, learning_rate=3e-3, weight_decay=0.05)

    def loss_fn(params, batch, key):
        images, labels = batch
        logits = model.apply({"params": params}, _pictures(images, key))
        return loss(logits, labels).mean(), {}

    images = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    head = jax.jit(model.init)(jax.random.key(_SEED), images)["params"]["head"]
    params = {**Judge.load(output, "recognizer").params, "head": head}
    draw = partial(draw_labelled, scenes, label, recipe.batch_size)
    params = fit(name, recipe, loss_fn, draw, params, workdir, _SEED)
    return Judge(classes, params).save(output, name)


def _num_empty(size: int) -> int:
    return round(_EMPTY_SHARE * size)


def _pictures(images, key):
    scenes = images.astype(jnp.float32) / 255
    return make_scene_pictures(key, scenes, _num_empty(len(images)), _HUE, _DAMAGE)


def _examination(sprites: Sprites, label: Label) -> tuple[np.ndarray, np.ndarray]:
    """Pictures that training never saw, spoilt as its own are, and their labels."""
    scenes = SceneSampler(sprites, _MIXTURE)
    images, labels = draw_labelled(scenes, label, 1024, np.random.default_rng(_SEED + 1))
    return np.asarray(jax.jit(_pictures)(images, jax.random.key(_SEED + 1))), labels


def _mean(values: np.ndarray) -> float:
    return round(float(values.mean()), 4)

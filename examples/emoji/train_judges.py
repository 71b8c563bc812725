"""Trains the judges of `evaluation.judges` on real emoji and measures them on others.

    python -m examples.emoji.train_judges --data=DIR --workdir=DIR --output=DIR

`--data` is a folder that examples/emoji/fetch_data.sh has filled. The output is what `load_judges`
reads: `NAME.safetensors` of every judge, and `config.json` with their classes and accuracies.
"""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging

from alignprop_jax.devices.compilation import enable_compilation_cache
from alignprop_jax.errors import run_program
from alignprop_jax.evaluation.judges import IMAGE_SIZE, NOTHING, ConvClassifier, Judge
from alignprop_jax.loading.weights import ParamTree
from alignprop_jax.prompts.built_in import ANIMALS, ANIMALS_UNSEEN
from examples.emoji.agreement_judge import train_agreement
from examples.emoji.emoji_dataset import prepare
from examples.emoji.fit import Recipe, fit
from examples.emoji.judge_pictures import make_pictures
from examples.emoji.names import STYLES
from examples.emoji.scene_judges import train_counter, train_finder
from examples.emoji.scenes import SceneMixture, SceneSampler
from examples.emoji.sprites import Sprites, load_sprites

_SEED = 1729  # of no other part of the project


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What one judge learns.

    Attributes:
        classes: the last one is `NOTHING`.
        by_class: for each other class, in order, the groups of sprites that show it. Classes, then
            groups, then sprites are drawn evenly.
        nothing_share: share of pictures without an object.
        hue: standard deviation of the shift in hue, in radians.
        damage: how much detail the pictures lose, see `make_pictures`.
        washed: share of pictures under a wash of colour.
    """

    classes: tuple[str, ...]
    by_class: Sequence[Sequence[Sequence[int]]]
    nothing_share: float
    hue: float
    damage: float
    washed: float

    def draw(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Labels and sprites, int [size] each.

        The last `num_empty(size)` are to show nothing, and have a sprite to spoil.
        """
        labels = rng.integers(len(self.by_class), size=size)
        sprites = [
            rng.choice(self.by_class[k][rng.integers(len(self.by_class[k]))]) for k in labels
        ]
        labels[size - self.num_empty(size) :] = len(self.by_class)
        return labels, np.array(sprites)

    def num_empty(self, size: int) -> int:
        """How many of a batch are to show nothing."""
        return round(self.nothing_share * size)


def recognizer_lesson(sprites: Sprites) -> Lesson:
    """The animals of the built-in prompts, whatever the style."""
    animals = (*ANIMALS, *ANIMALS_UNSEEN)
    by_class = [[sprites.by_name_and_style[name, style] for style in STYLES] for name in animals]
    return Lesson((*animals, NOTHING), by_class, nothing_share=0.1, hue=0.3, damage=1.0, washed=0.0)


def style_lesson(sprites: Sprites, names: Sequence[str]) -> Lesson:
    """Flat or glossy, whatever is shown.

    Shading is what tells, so the pictures keep more of their detail than the recognizer's.
    """
    by_class = [[sprites.by_name_and_style[name, style] for name in names] for style in STYLES]
    return Lesson((*STYLES, NOTHING), by_class, nothing_share=0.2, hue=0.3, damage=0.4, washed=0.4)


def train_recognizer(sprites: Sprites, workdir: Path, output: Path) -> dict[str, Any]:
    """Trains the recognizer and writes it; returns its entry in `config.json`."""
    lesson = recognizer_lesson(sprites)
    recognizer = _train("recognizer", lesson, sprites, 1400, workdir, output)
    clean = _plain_pictures(sprites, (*ANIMALS, *ANIMALS_UNSEEN))
    return {
        "classes": recognizer.classes,
        "accuracy": {
            "plain": _share(recognizer, clean, "name"),
            **_spoilt_accuracy(recognizer, lesson, sprites),
        },
    }


def train_style(sprites: Sprites, workdir: Path, output: Path) -> dict[str, Any]:
    """Trains the judge of style and writes it; returns its entry in `config.json`.

    Style is subtle: it is learnt in a third of the steps from features that can tell animals.
    """
    held_out = _hold_out(sprites.unique_names)
    learnt = [name for name in sprites.unique_names if name not in held_out]
    features = Judge.load(output, "recognizer").params
    style = _train("style", style_lesson(sprites, learnt), sprites, 900, workdir, output, features)
    unseen = _plain_pictures(sprites, held_out)
    return {
        "classes": style.classes,
        "held_out_names": held_out,
        "accuracy": {
            "plain_held_out": _share(style, unseen, "style"),
            **_spoilt_accuracy(style, style_lesson(sprites, held_out), sprites, "_held_out"),
        },
    }


# In the order in which they are trained: the next three start from the recognizer's features.
JUDGES = {
    "recognizer": train_recognizer,
    "style": train_style,
    "counter": train_counter,
    "finder": train_finder,
    "agreement": train_agreement,
}


def train_judges(
    sprites: Sprites, workdir: Path, output: Path, names: Sequence[str]
) -> dict[str, Any]:
    """Trains the judges of these names and writes them; returns the content of `config.json`."""
    path = output / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in names:
        config[name] = JUDGES[name](sprites, workdir, output)
        path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return config


def _hold_out(names: Sequence[str]) -> list[str]:
    """A fifth of the names, whose pictures neither judge ever learns from."""
    others = [name for name in names if name not in (*ANIMALS, *ANIMALS_UNSEEN)]
    rng = np.random.default_rng(_SEED)
    return sorted(rng.choice(others, len(names) // 5, replace=False).tolist())


def _train(
    name: str,
    lesson: Lesson,
    sprites: Sprites,
    num_steps: int,
    workdir: Path,
    output: Path,
    features: ParamTree | None = None,
) -> Judge:
    """Trains and writes one judge, all but its head from the weights `features` of another."""
    model = ConvClassifier(len(lesson.classes))
    table = jnp.asarray(_premultiplied(sprites.images))
    recipe = Recipe(num_steps, batch_size=48, learning_rate=3e-3, weight_decay=0.05)

    def loss_fn(params, batch, key):
        labels, indices = batch
        pictures = _pictures(lesson, table, indices, key)
        logits = model.apply({"params": params}, pictures)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, {"accuracy": (logits.argmax(-1) == labels).mean()}

    images = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    params = jax.jit(model.init)(jax.random.key(_SEED), images)["params"]
    if features is not None:
        # A copy: training gives its buffers away.
        params = {**jax.tree.map(jnp.copy, features), "head": params["head"]}
    draw = partial(lesson.draw, size=recipe.batch_size)
    params = fit(name, recipe, loss_fn, draw, params, workdir, _SEED, checkpoint_every=100)
    return Judge(lesson.classes, params).save(output, name)


def _pictures(lesson: Lesson, table, indices, key):
    sprites = table[indices].astype(jnp.float32) / 255
    return make_pictures(
        key, sprites, lesson.num_empty(len(indices)), lesson.hue, lesson.damage, lesson.washed
    )


def _premultiplied(images: np.ndarray) -> np.ndarray:
    """uint8 RGBA, the colours multiplied by alpha."""
    alpha = images[..., 3:].astype(np.uint16)
    return np.concatenate([(images[..., :3] * alpha + 127) // 255, alpha], -1).astype(np.uint8)


def _plain_pictures(sprites: Sprites, names: Sequence[str], draws: int = 8) -> list[dict[str, Any]]:
    """Real emoji as the model's training data shows them: whole, on white, of several sizes."""
    scenes, rng = SceneSampler(sprites, SceneMixture()), np.random.default_rng(_SEED + 1)
    return [
        {"image": scenes.single(rng, name, style), "name": name, "style": style}
        for name in names
        for style in STYLES
        for _ in range(draws)
    ]


def _share(judge: Judge, pictures: list[dict[str, Any]], key: str) -> float:
    images = np.stack([picture["image"] for picture in pictures]).astype(np.float32) / 255
    return _accuracy(judge, images, [picture[key] for picture in pictures])


def _spoilt_accuracy(
    judge: Judge, lesson: Lesson, sprites: Sprites, suffix: str = ""
) -> dict[str, float]:
    """Accuracy over draws that training never saw, and over pictures of nothing alone."""
    table = jnp.asarray(_premultiplied(sprites.images))
    labels, indices = lesson.draw(np.random.default_rng(_SEED + 2), 1024)
    pictures = jax.jit(partial(_pictures, lesson))(table, indices, jax.random.key(_SEED + 2))
    pictures, wanted = np.asarray(pictures), np.array(lesson.classes)[labels]
    nothing = wanted == NOTHING
    return {
        f"spoilt{suffix}": _accuracy(judge, pictures[~nothing], wanted[~nothing]),
        "nothing": _accuracy(judge, pictures[nothing], wanted[nothing]),
    }


def _accuracy(judge: Judge, images: np.ndarray, wanted: Sequence[str]) -> float:
    return round(float(np.mean(np.array(judge.classify(images)) == np.array(wanted))), 4)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.INFO)
    enable_compilation_cache()
    workdir = Path(flags.FLAGS.workdir)
    prepare(flags.FLAGS.data, workdir / "data")
    sprites, output = load_sprites(workdir / "data"), Path(flags.FLAGS.output)
    config = train_judges(sprites, workdir, output, flags.FLAGS.judge)
    for name in flags.FLAGS.judge:
        print(f"{name}: {config[name]['accuracy']}")


if __name__ == "__main__":
    # Not at import: other programs that train judges have flags of these names.
    flags.DEFINE_string("data", None, "Folder that examples/emoji/fetch_data.sh has filled.")
    flags.DEFINE_string("workdir", None, "Checkpoints and intermediate data.")
    flags.DEFINE_string("output", None, "Folder to write the judges to.")
    flags.DEFINE_multi_enum("judge", list(JUDGES), list(JUDGES), "Judges to train, in order.")
    flags.mark_flags_as_required(["data", "workdir", "output"])
    run_program(main)

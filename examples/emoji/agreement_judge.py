"""Training the judge of agreement with the prompt: a CLIP that shares no seed with the reward's."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from alignprop_jax.loading.tokenizer import load_tokenizer
from alignprop_jax.rewards.clip_similarity import make_clip_score_reward
from examples.emoji import export
from examples.emoji.captions import caption, caption_words
from examples.emoji.contrastive import make_caption_batches, train_clip_model
from examples.emoji.fit import Recipe
from examples.emoji.scenes import Scene, SceneMixture, SceneSampler
from examples.emoji.sprites import Sprites
from examples.emoji.tokenizer import build_tokenizer

_SEED = 4211  # of no other part of the project
_MIXTURE = SceneMixture(single=0.25, count=0.2, pair=0.2, colored=0.1, colored_pair=0.25)
_SIZES = {"width": 128, "text_layers": 2, "vision_layers": 4, "num_heads": 4, "patch_size": 8}


def train_agreement(sprites: Sprites, workdir: Path, output: Path) -> dict[str, Any]:
    """Trains the judge and writes it to clip/; returns its entry in `config.json`."""
    folder = output / "clip"
    build_tokenizer(caption_words(), folder)
    tokenizer = load_tokenizer(folder)
    config = export.clip_config(_SIZES, tokenizer)
    recipe = Recipe(1500, batch_size=64, learning_rate=2e-3, muon=True)
    batches = make_caption_batches(
        SceneSampler(sprites, _MIXTURE), tokenizer, recipe.batch_size, 0.1, 0.15
    )
    params = train_clip_model("agreement", config, recipe, batches, workdir, _SEED)
    export.write_clip_model(folder, config, params)
    return {"accuracy": _accuracy(folder, SceneSampler(sprites, _COLORED_PAIRS))}


_COLORED_PAIRS = SceneMixture(
    single=0,
    count=0,
    pair=0,
    colored=0,
    on_background=0,
    colored_on_background=0,
    colored_pair=1,
)


def _accuracy(folder: Path, scenes: SceneSampler) -> dict[str, float]:
    """How often a scene of a coloured pair agrees more with its caption than with a false one."""
    rng = np.random.default_rng(_SEED)
    drawn = [scenes.scene(rng) for _ in range(256)]
    images = np.stack([scene.image for scene in drawn]).astype(np.float32) / 255
    reward = make_clip_score_reward(str(folder))
    score = jax.jit(reward.score)

    def agreement(captions: list[str]) -> np.ndarray:
        return np.asarray(score(reward.params, images, reward.prepare(captions)))

    true = agreement([scene.caption for scene in drawn])
    return {
        name: round(float((true > agreement([change(scene) for scene in drawn])).mean()), 4)
        for name, change in {"animals": _other_animal, "colors": _swapped_colors}.items()
    }


def _other_animal(scene: Scene) -> str:
    first, second = scene.factors["names"]
    other = next(name for name in ("zebra", "cat", "bee") if name not in (first, second))
    return caption((other, second), colors=scene.factors["colors"])


def _swapped_colors(scene: Scene) -> str:
    return caption(scene.factors["names"], colors=scene.factors["colors"][::-1])

"""Tunes the emoji model that ships with the package; minutes on 2 cores of a laptop's CPU.

    python -m alignprop_jax.train --config=configs/emoji.py:aesthetic --workdir=runs/aesthetic

aesthetic: glossy 3D art scores high and flat art low, so the animals turn glossy; 6 minutes.
    docs/over_optimization.md says how these settings were found.
alignment: prompts such as "a red cat and a blue lion" are met better; 4 minutes.
jpeg_compress: fewer kB as JPEG at quality 95; 7 minutes.
jpeg_incompress: more of them; 5 minutes.
count: prompts such as "three cats" show as many; 4 minutes.
remove: frogs vanish from beside other animals; 2 minutes.
combination: glossy in fewer kB; 6 minutes.

A reward that does not look at the prompt is summed with agreement with it, which holds on to the
animal. Weights and targets are in standard deviations of what the untrained model earns.
"""

from ml_collections import ConfigDict

from alignprop_jax.config import default_config
from alignprop_jax.errors import UserError


def get_config(variant: str = "aesthetic") -> ConfigDict:
    """Returns the config of a variant.

    Raises:
      UserError: the variant is unknown.
    """
    if variant not in _VARIANTS:
        raise UserError(f"configs/emoji.py has no variant {variant!r}; one of {list(_VARIANTS)}")
    config = default_config()
    config.sampler.num_steps = 10
    config.sampler.guidance_scale = 2.5
    # Of so few steps all can be trained.
    config.truncation.strategy = "full"
    config.truncation.max = 9
    config.train.batch_size = 16
    _VARIANTS[variant](config)
    # Four pictures of the way between before and after.
    config.logging.image_every = config.train.num_steps // 4
    return config


def _aesthetic(config: ConfigDict) -> None:
    config.reward = {"aesthetic": 1.0, "clip_score": 0.3}
    config.loss.target = 3.5
    config.train.num_steps = 42
    config.train.learning_rate = 3.5e-3


def _jpeg_compress(config: ConfigDict) -> None:
    config.reward = {"jpeg_compress": 1.0, "clip_score": 0.4}
    config.loss.target = 4.0
    config.train.num_steps = 48
    config.train.learning_rate = 5e-3


def _jpeg_incompress(config: ConfigDict) -> None:
    config.reward = {"jpeg_incompress": 1.0, "clip_score": 0.4}
    config.loss.target = 2.5
    config.train.num_steps = 32
    config.train.learning_rate = 2.5e-3


def _count(config: ConfigDict) -> None:
    config.prompts = "animal_counts"
    config.eval_prompts = "animal_counts_unseen"
    config.evaluation.samples_per_prompt = 1
    config.reward = {"count": 1.0, "clip_score": 0.3}
    config.loss.target = 2.5
    config.train.num_steps = 24
    config.train.learning_rate = 6e-3


def _remove(config: ConfigDict) -> None:
    config.prompts = "animals_with_a_frog"
    config.eval_prompts = "animals_with_a_frog_unseen"
    config.remove.concept = "frog"
    config.evaluation.samples_per_prompt = 2
    config.reward = {"remove": 1.0}
    config.loss.target = 1.3
    config.train.num_steps = 8
    config.train.learning_rate = 2.5e-3


def _alignment(config: ConfigDict) -> None:
    config.prompts = "colored_pairs"
    config.eval_prompts = "colored_pairs_unseen"
    config.reward = {"clip_score": 1.0}
    config.loss.target = 2.5
    config.train.num_steps = 24
    config.train.learning_rate = 5e-3


def _combination(config: ConfigDict) -> None:
    config.reward = {"aesthetic": 1.0, "jpeg_compress": 1.0, "clip_score": 0.5}
    config.loss.target = 5.0
    config.train.num_steps = 46
    config.train.learning_rate = 5e-3


_VARIANTS = {
    "aesthetic": _aesthetic,
    "alignment": _alignment,
    "jpeg_compress": _jpeg_compress,
    "jpeg_incompress": _jpeg_incompress,
    "count": _count,
    "remove": _remove,
    "combination": _combination,
}

"""Tunes the emoji model that ships with the package; minutes on a laptop's CPU.

    python -m alignprop_jax.train --config=configs/emoji.py:aesthetic --workdir=runs/aesthetic

aesthetic: glossy 3D art scores high and flat art low, so the animals turn glossy.
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
    config.sampler.num_steps = 20
    config.sampler.guidance_scale = 3.0
    config.truncation.max = 19
    _VARIANTS[variant](config)
    return config


def _aesthetic(config: ConfigDict) -> None:
    config.reward = "aesthetic"
    config.train.num_steps = 40
    config.train.batch_size = 8
    config.logging.image_every = 10


_VARIANTS = {"aesthetic": _aesthetic}

"""Tunes Stable Diffusion XL at 1024 x 1024.

    python -m alignprop_jax.train --config=configs/sdxl.py:aesthetic --workdir=runs/sdxl_aesthetic

The variants are those of configs/sd15.py, and each with `turbo_` before it tunes SDXL Turbo, which
takes 4 steps without guidance at 512 x 512. Nothing is published of AlignProp on these models.
"""

from ml_collections import ConfigDict

from alignprop_jax.runs.recipes import full_size_config

_TURBO = "turbo_"


def get_config(variant: str = "aesthetic") -> ConfigDict:
    """Returns the config of a variant; UserError for an unknown one."""
    if variant.startswith(_TURBO):
        return _turbo(variant.removeprefix(_TURBO))
    config = full_size_config("stabilityai/stable-diffusion-xl-base-1.0", variant)
    config.train.microbatch_size = 8
    return config


def _turbo(variant: str) -> ConfigDict:
    config = full_size_config("stabilityai/sdxl-turbo", variant)
    config.sampler.num_steps = 4
    config.sampler.guidance_scale = 1.0
    config.sampler.height = config.sampler.width = 512
    # Few enough to train them all, or the last.
    config.truncation.strategy = "fixed" if variant.endswith("_k1") else "full"
    config.truncation.start = 3
    return config

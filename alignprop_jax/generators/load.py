"""Loads a generator by the name or the place of a model."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from alignprop_jax.generators.loaded import Loaded
from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.generators.stable_diffusion.prompts import encode
from alignprop_jax.nn.execution import Execution

_IN_FLOAT32 = Execution()


def load_generator(
    model: str | Path,
    execution: Execution = _IN_FLOAT32,
    sample_size: tuple[int, int] = (0, 0),
    shardings_of: Callable[[Any], Any] | None = None,
) -> Loaded:
    """Loads a model.

    Args:
        model: see `pretrained.open_model`.
        execution: how its networks are computed.
        sample_size: height and width of its pictures; 0 for those of the model.
        shardings_of: how frozen weights lie on the devices, from their shapes.

    Raises:
        UserError: there is no such model, or it cannot be had, is damaged or not supported.
    """
    sd, params, tokenizers = load_stable_diffusion(model, execution, sample_size, shardings_of)
    frozen = {"unet": params["unet"], "vae": params["vae"]}
    adaptable = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        for name, tree in params.items()
        if name != "vae"
    }
    encode_all = functools.partial(encode, sd, params, tokenizers)
    return Loaded(sd, frozen, encode_all, adaptable, tokenizers[0])

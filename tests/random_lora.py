"""LoRA as after training: all factors of a size that shows."""

from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.lora.factors import ATTENTION_PROJECTIONS, init_lora
from alignprop_jax.lora.files import save_lora


def randomize_lora(lora, seed=0, size=0.6):
    """Factors of the same shapes, all of them random, of standard deviation `size`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: size * rng.standard_normal(leaf.shape, np.float32), lora)


def lora_changes(lora):
    """What the factors add to the weights of each layer, [out, in]."""
    factors = flatten_dict(lora)
    return {
        ".".join(keys[:-1]): np.asarray(leaf @ factors[*keys[:-1], "up"]).T
        for keys, leaf in factors.items()
        if keys[-1] == "down"
    }


def save_random_lora(
    path: Path,
    model: Path,
    seed: int,
    rank: int,
    alpha: float,
    targets=ATTENTION_PROJECTIONS,
    size=0.6,
) -> None:
    """Writes a LoRA for the model in a folder."""
    _, params, _ = load_stable_diffusion(model)
    lora = randomize_lora(init_lora(jax.random.key(0), params["unet"], rank, targets), seed, size)
    save_lora(path, lora, alpha)

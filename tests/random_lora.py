"""LoRA files as after training: all factors of a size that shows."""

from pathlib import Path

import jax
import numpy as np

from alignprop_jax.lora import ATTENTION_PROJECTIONS, init_lora
from alignprop_jax.lora_file import save_lora
from alignprop_jax.pretrained import load_stable_diffusion


def save_random_lora(
    path: Path, model: Path, seed: int, rank: int, alpha: float, targets=ATTENTION_PROJECTIONS
) -> None:
    """Writes a LoRA for the model in a folder."""
    _, params, _ = load_stable_diffusion(model)
    shapes = init_lora(jax.random.key(0), params["unet"], rank, targets)
    rng = np.random.default_rng(seed)
    lora = jax.tree.map(lambda leaf: 0.6 * rng.standard_normal(leaf.shape, np.float32), shapes)
    save_lora(path, lora, alpha)

"""Scenes encoded once, so that the UNet's training need not draw and encode them again."""

from pathlib import Path

import jax
import numpy as np
from absl import logging

from alignprop_jax.nn.vae import AutoencoderKL
from examples.emoji.pixels import to_pixel_values
from examples.emoji.scenes import SceneSampler

_BATCH = 64


def encode_scenes(
    vae: AutoencoderKL,
    params,
    scenes: SceneSampler,
    num_scenes: int,
    seed: int,
    cache: Path | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Latent means, float16 [N, h, w, C], not scaled, and the captions of N random scenes.

    Args:
        cache: .npz file that is read when it exists and written otherwise.
    """
    if cache is not None and cache.exists():
        stored = np.load(cache)
        return stored["latents"], stored["captions"].tolist()

    @jax.jit
    def encode(images):
        pixels = to_pixel_values(images)
        return vae.apply({"params": params}, pixels, method="encode")[0]

    rng = np.random.default_rng([seed, num_scenes])
    latents, captions = [], []
    for _ in range(-(-num_scenes // _BATCH)):
        images, texts = scenes.batch(rng, _BATCH)
        latents.append(np.asarray(encode(images), np.float16))
        captions += texts
    result = np.concatenate(latents)[:num_scenes], captions[:num_scenes]
    if cache is not None:
        temporary = cache.with_suffix(".tmp.npz")
        np.savez(temporary, latents=result[0], captions=np.array(result[1]))
        temporary.replace(cache)
        logging.info("encoded %d scenes", num_scenes)
    return result

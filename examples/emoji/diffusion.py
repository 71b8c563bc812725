"""Training the UNet on the latents of scenes (v prediction: Salimans & Ho, arXiv 2202.00512)."""

import jax
import jax.numpy as jnp
import numpy as np

from alignprop_jax.generators.stable_diffusion.unet import UNet
from examples.emoji.fit import BatchFn, LossFn


def make_diffusion_loss(unet: UNet, alpha_bar: jax.Array, text_table: jax.Array) -> LossFn:
    """Mean squared error of v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0.

    Args:
        alpha_bar: [T], the scheduler's.
        text_table: [P, L, D], encoded captions; row 0 is the empty one.
    """

    def loss_fn(params, batch, key):
        latents, captions = batch
        size = latents.shape[0]
        noise_key, time_key, offset_key = jax.random.split(key, 3)
        noise = jax.random.normal(noise_key, latents.shape)
        # One timestep from each of `size` equal intervals: less variance than independent draws.
        positions = (jnp.arange(size) + jax.random.uniform(time_key, (size,))) / size
        timesteps = (positions * alpha_bar.shape[0]).astype(jnp.int32)
        signal = alpha_bar[timesteps][:, None, None, None]
        noisy = jnp.sqrt(signal) * latents + jnp.sqrt(1 - signal) * noise
        velocity = jnp.sqrt(signal) * noise - jnp.sqrt(1 - signal) * latents
        prediction = unet.apply({"params": params}, noisy, timesteps, text_table[captions])
        return ((prediction - velocity) ** 2).mean(), {}

    return loss_fn


def make_latent_batches(
    latents: np.ndarray, captions: np.ndarray, batch_size: int, caption_dropout: float
) -> BatchFn:
    """Batches of latents [B, h, w, C] and caption indices [B], some replaced by 0, the empty one.

    Args:
        latents: [N, h, w, C], scaled to unit variance.
        captions: [N], indices into the text table.
    """

    def batch_fn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.integers(len(latents), size=batch_size)
        dropped = rng.random(batch_size) < caption_dropout
        return latents[chosen].astype(np.float32), np.where(dropped, 0, captions[chosen])

    return batch_fn

"""Training the autoencoder: reconstruction, and a light pull of the latents to N(0, 1)."""

import jax
import jax.numpy as jnp
import numpy as np

from alignprop_jax.models.vae import AutoencoderKL
from alignprop_jax.pretraining.fit import BatchFn, LossFn
from alignprop_jax.pretraining.scenes import SceneSampler


def make_autoencoder_loss(model: AutoencoderKL, kl_weight: float) -> LossFn:
    """L1 of the pixels + L1 of their differences to the next pixel + kl_weight * KL a latent.

    Differences keep edges sharp, which L1 alone lets blur.
    """

    def loss_fn(params, batch, key):
        images = batch.astype(jnp.float32) / 127.5 - 1.0
        mean, log_variance = model.apply({"params": params}, images, method="encode")
        latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        error = model.apply({"params": params}, latents, method="decode") - images
        l1 = jnp.abs(error).mean()
        edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
        kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1.0 - log_variance).mean()
        return l1 + edges + kl_weight * kl, {"l1": l1, "kl": kl}

    return loss_fn


def make_image_batches(scenes: SceneSampler, batch_size: int) -> BatchFn:
    """Batches of scenes, uint8 [B, 64, 64, 3]."""

    def batch_fn(rng: np.random.Generator) -> np.ndarray:
        return scenes.batch(rng, batch_size)[0]

    return batch_fn

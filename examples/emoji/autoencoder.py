"""Training the autoencoder: reconstruction, and a light pull of the latents to N(0, 1)."""

import jax
import jax.numpy as jnp
import numpy as np

from alignprop_jax.loading.weights import ParamTree
from alignprop_jax.nn.vae import AutoencoderKL
from examples.emoji.fit import BatchFn, LossFn
from examples.emoji.pixels import to_pixel_values
from examples.emoji.scenes import SceneSampler


def make_autoencoder_loss(model: AutoencoderKL, kl_weight: float) -> LossFn:
    """L1 of the pixels + L1 of their differences to the next pixel + kl_weight * KL a latent.

    Differences keep edges sharp, which L1 alone lets blur.
    """

    def loss_fn(params, batch, key):
        images = to_pixel_values(batch)
        mean, log_variance = model.apply({"params": params}, images, method="encode")
        latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        decoded = model.apply({"params": params}, latents, method="decode")
        l1, edges = _reconstruction_errors(decoded, images)
        kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1.0 - log_variance).mean()
        return l1 + edges + kl_weight * kl, {"l1": l1, "kl": kl}

    return loss_fn


def make_decoder_loss(model: AutoencoderKL, frozen: ParamTree, latent_noise: float) -> LossFn:
    """The reconstruction part alone, for the decoder of an encoder that stays as it is.

    Args:
        frozen: the encoder's parameters.
        latent_noise: standard deviation of what is added to latents, as a share of theirs: sampled
            latents are not exact either.
    """

    def loss_fn(params, batch, key):
        images = to_pixel_values(batch)
        latents, _ = model.apply({"params": frozen}, images, method="encode")
        scale = latent_noise / model.config.scaling_factor
        latents += scale * jax.random.normal(key, latents.shape)
        decoded = model.apply({"params": params}, latents, method="decode")
        l1, edges = _reconstruction_errors(decoded, images)
        return l1 + edges, {"l1": l1}

    return loss_fn


def _reconstruction_errors(decoded: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean absolute error of the pixels, and of their differences to the next pixel."""
    error = decoded - images
    edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    return jnp.abs(error).mean(), edges


def make_image_batches(scenes: SceneSampler, batch_size: int) -> BatchFn:
    """Batches of scenes, uint8 [B, 64, 64, 3]."""

    def batch_fn(rng: np.random.Generator) -> np.ndarray:
        return scenes.batch(rng, batch_size)[0]

    return batch_fn

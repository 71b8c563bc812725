"""The autoencoder's losses against derivations, on stand-ins whose outputs are parameters."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.loading.pretrained import abstract_params
from alignprop_jax.nn.vae import AutoencoderKL, VAEConfig
from examples.emoji.autoencoder import (
    make_autoencoder_loss,
    make_decoder_loss,
    make_image_batches,
)
from tests.synthetic_scenes import make_scenes

KEY = jax.random.key(0)
QUICK_COMPILATION = {"xla_backend_optimization_level": 0}


class StandIn:
    """Encodes to the parameters "mean" and "log_variance", decodes to "decoded" plus 0 latents."""

    config = types.SimpleNamespace(scaling_factor=0.5)

    def apply(self, variables, x, method):
        params = variables["params"]
        if method == "encode":
            self.images = x
            return params["mean"], params["log_variance"]
        self.latents = x
        return params["decoded"] + 0.0 * x.sum()


def make_images(size=2):
    return np.random.default_rng(0).integers(0, 256, (size, 8, 8, 3)).astype(np.uint8)


def make_params(latents=(2, 4, 4, 3)):
    rng = np.random.default_rng(1)
    return {
        "mean": jnp.asarray(rng.normal(size=latents), jnp.float32),
        "log_variance": jnp.asarray(rng.normal(size=latents), jnp.float32),
        "decoded": jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32),
    }


def reconstruction_errors(decoded, images):
    """Mean absolute error of pixels, and of the steps to the pixel below and to the right."""
    target = images / 255 * 2 - 1
    below = (decoded[:, 1:] - decoded[:, :-1]) - (target[:, 1:] - target[:, :-1])
    right = (decoded[:, :, 1:] - decoded[:, :, :-1]) - (target[:, :, 1:] - target[:, :, :-1])
    return np.abs(decoded - target).mean(), np.abs(below).mean() + np.abs(right).mean()


def kl_divergence(mean, log_variance):
    """KL(N(mean, variance) || N(0, 1)), the integral of p log(p / q) as a sum."""
    x, dx = np.linspace(-30, 30, 20001, retstep=True)
    deviation = np.exp(log_variance / 2)
    log_p = -(((x - mean) / deviation) ** 2) / 2 - np.log(deviation)
    return (np.exp(log_p) / np.sqrt(2 * np.pi) * (log_p + x**2 / 2)).sum() * dx


def test_loss_is_reconstruction_and_kl_divergence():
    params, images = make_params(), make_images()
    l1, edges = reconstruction_errors(np.asarray(params["decoded"], np.float64), images)
    pairs = zip(params["mean"].ravel(), params["log_variance"].ravel(), strict=True)
    kl = np.mean([kl_divergence(float(m), float(v)) for m, v in pairs])
    loss, metrics = make_autoencoder_loss(StandIn(), kl_weight=0.3)(params, images, KEY)
    assert float(metrics["l1"]) == pytest.approx(l1, rel=1e-5)
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-4)
    assert float(loss) == pytest.approx(l1 + edges + 0.3 * kl, rel=1e-5)


def test_perfect_reconstruction_of_standard_latents_costs_nothing():
    images = make_images()
    params = {
        "mean": jnp.zeros((2, 4, 4, 3)),
        "log_variance": jnp.zeros((2, 4, 4, 3)),
        "decoded": jnp.asarray(images / 127.5 - 1, jnp.float32),
    }
    loss, _ = make_autoencoder_loss(StandIn(), kl_weight=1.0)(params, images, KEY)
    assert float(loss) == pytest.approx(0, abs=1e-5)


def test_latents_are_drawn_around_their_mean_with_their_deviation():
    params = make_params(latents=(2, 64, 64, 4))
    model = StandIn()
    make_autoencoder_loss(model, kl_weight=0.0)(params, make_images(), KEY)
    noise = (model.latents - params["mean"]) / np.exp(0.5 * params["log_variance"])
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    make_autoencoder_loss(model, kl_weight=0.0)(params, make_images(), jax.random.key(1))
    again = (model.latents - params["mean"]) / np.exp(0.5 * params["log_variance"])
    assert abs(np.corrcoef(noise.ravel(), again.ravel())[0, 1]) < 0.03


def test_decoder_loss_is_the_reconstruction_from_noisy_frozen_latents():
    params, images = make_params(latents=(2, 64, 64, 4)), make_images()
    frozen = {name: params[name] for name in ("mean", "log_variance")}
    decoder = {"decoded": params["decoded"]}
    model = StandIn()
    loss, metrics = make_decoder_loss(model, frozen, latent_noise=0.1)(decoder, images, KEY)
    l1, edges = reconstruction_errors(np.asarray(params["decoded"], np.float64), images)
    assert float(metrics["l1"]) == pytest.approx(l1, rel=1e-5)
    assert float(loss) == pytest.approx(l1 + edges, rel=1e-5)
    np.testing.assert_allclose(model.images, images / 255 * 2 - 1, atol=1e-6)
    # Latents have a deviation of 1 / scaling_factor, and the noise a tenth of that.
    assert float((model.latents - params["mean"]).std()) == pytest.approx(0.2, rel=0.02)


def test_decoder_loss_takes_the_two_halves_of_a_real_autoencoder():
    model = AutoencoderKL(VAEConfig(channels=(8, 8), layers_per_block=1, norm_num_groups=4))
    images = make_images()
    pixels = jnp.asarray(images / 127.5 - 1, jnp.float32)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32),
        abstract_params(model),
    )
    frozen = {name: params[name] for name in ("encoder", "quant_conv")}
    decoder = {name: params[name] for name in params if name not in frozen}

    def reconstruct(params):
        mean, _ = model.apply({"params": params}, pixels, method="encode")
        return model.apply({"params": params}, mean, method="decode")

    def loss_and_reconstruction(params, frozen, decoder):
        loss_fn = make_decoder_loss(model, frozen, latent_noise=0.0)
        return loss_fn(decoder, images, KEY)[0], reconstruct(params)

    compiled = jax.jit(loss_and_reconstruction, compiler_options=QUICK_COMPILATION)
    loss, reconstructed = compiled(params, frozen, decoder)
    expected = sum(reconstruction_errors(np.asarray(reconstructed), images))
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_batches_are_scenes():
    batch = make_image_batches(make_scenes(), 5)(np.random.default_rng(3))
    expected, _ = make_scenes().batch(np.random.default_rng(3), 5)
    np.testing.assert_array_equal(batch, expected)

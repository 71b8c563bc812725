"""The diffusion loss: noise, velocity and timesteps against their definitions and diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.processes.ddim import DDIMScheduler
from examples.emoji.diffusion import make_diffusion_loss, make_latent_batches
from examples.emoji.export import scheduler_config

ALPHA_BAR = DDIMScheduler.from_config(scheduler_config()).alpha_bar
TEXT_TABLE = np.random.default_rng(0).normal(size=(6, 3, 4)).astype(np.float32)
CAPTIONS = np.array([5, 0, 2, 2, 1, 4, 3, 0])


class PredictionAsParams:
    """A stand-in for the UNet whose prediction is its parameters; remembers its inputs."""

    def apply(self, variables, noisy, timesteps, context):
        self.noisy, self.timesteps, self.context = noisy, timesteps, context
        return variables["params"]


def make_latents(batch=8):
    return np.random.default_rng(1).normal(size=(batch, 16, 16, 4)).astype(np.float32)


def evaluate(seed=0, latents=None, captions=CAPTIONS):
    """The inputs of the UNet, and the velocity it is compared with, by the loss' gradient."""
    latents = make_latents() if latents is None else latents
    unet = PredictionAsParams()
    loss_fn = make_diffusion_loss(unet, jnp.asarray(ALPHA_BAR), jnp.asarray(TEXT_TABLE))
    prediction = jnp.asarray(np.random.default_rng(2).normal(size=latents.shape), jnp.float32)
    batch = (latents, captions)
    loss, _ = loss_fn(prediction, batch, jax.random.key(seed))
    inputs = [np.array(x) for x in (unet.noisy, unet.timesteps, unet.context)]
    gradient, _ = jax.grad(loss_fn, has_aux=True)(prediction, batch, jax.random.key(seed))
    # The mean of (prediction - v)^2 has the gradient 2 (prediction - v) / size.
    velocity = np.asarray(prediction - gradient * prediction.size / 2)
    return (*inputs, velocity, float(loss), np.asarray(prediction))


def test_velocity_and_noisy_latents_are_a_rotation_of_signal_and_noise():
    latents = make_latents()
    noisy, timesteps, _, velocity, loss, prediction = evaluate()
    angle = np.arccos(np.sqrt(ALPHA_BAR[timesteps].astype(np.float64)))[:, None, None, None]
    # (x_t, v) is (x_0, noise) turned by the angle, so turning back gives both.
    np.testing.assert_allclose(np.cos(angle) * noisy - np.sin(angle) * velocity, latents, atol=2e-4)
    noise = np.sin(angle) * noisy + np.cos(angle) * velocity
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert np.abs(np.corrcoef(noise.reshape(8, -1)) - np.eye(8)).max() < 0.2
    assert loss == pytest.approx(((prediction - velocity) ** 2).mean(), rel=1e-4)


def test_velocity_and_noisy_latents_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    scheduler = diffusers.DDIMScheduler.from_config(scheduler_config())
    noisy, timesteps, _, velocity, _, _ = evaluate()
    alpha_bar = ALPHA_BAR[timesteps][:, None, None, None]
    noise = torch.from_numpy(np.sqrt(1 - alpha_bar) * noisy + np.sqrt(alpha_bar) * velocity)
    latents, steps = torch.from_numpy(make_latents()), torch.from_numpy(timesteps)
    # Their rescaled table differs by the rounding of square roots in float32.
    expected = scheduler.add_noise(latents, noise, steps).numpy()
    np.testing.assert_allclose(noisy, expected, atol=5e-4)
    expected = scheduler.get_velocity(latents, noise, steps).numpy()
    np.testing.assert_allclose(velocity, expected, atol=5e-4)


def test_timesteps_are_one_of_each_of_equal_intervals():
    drawn = np.stack([evaluate(seed)[1] for seed in range(20)])
    assert drawn.dtype == np.int32
    np.testing.assert_array_equal(drawn // 125, np.tile(np.arange(8), (20, 1)))
    within = drawn % 125
    assert within.min() < 15 and within.max() > 110
    assert within.std(axis=0).min() > 15 and within.std(axis=1).min() > 10


def test_text_is_that_of_the_captions():
    np.testing.assert_array_equal(evaluate()[2], TEXT_TABLE[CAPTIONS])


def draw(caption_dropout, batch_size=4000):
    """Latents hold their index, and captions twice it, from 1 on."""
    index = np.arange(1, 21)
    latents = np.broadcast_to(index[:, None, None, None], (20, 2, 2, 3)).astype(np.float16)
    batch_fn = make_latent_batches(latents, 2 * index, batch_size, caption_dropout)
    drawn, captions = batch_fn(np.random.default_rng(0))
    assert drawn.shape == (batch_size, 2, 2, 3) and drawn.dtype == np.float32
    return drawn[:, 0, 0, 0], captions


def test_latents_stay_with_their_captions_and_all_are_drawn():
    index, captions = draw(caption_dropout=0.0)
    np.testing.assert_array_equal(captions, 2 * index)
    assert np.bincount(index.astype(int), minlength=21)[1:].min() > 120


def test_share_of_captions_becomes_the_empty_one():
    index, captions = draw(caption_dropout=0.25)
    dropped = captions == 0
    assert dropped.mean() == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(captions[~dropped], 2 * index[~dropped])
    # Which are dropped has nothing to do with which were drawn.
    assert index[dropped].mean() == pytest.approx(index.mean(), abs=0.6)
    assert (draw(caption_dropout=1.0)[1] == 0).all()

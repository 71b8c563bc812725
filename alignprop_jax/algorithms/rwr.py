"""Reward-weighted regression: the diffusion loss on own samples, the better ones counting more.

Lee et al., arXiv 2302.12192; RWR in Black et al., arXiv 2305.13301.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from alignprop_jax.algorithms.rollouts import Fit, Rollouts
from alignprop_jax.diffusion.schedulers import DDIMScheduler


def make_rwr_fit(
    denoise: Callable[..., Array], scheduler: DDIMScheduler, temperature: float
) -> Fit:
    """Denoising of samples at a random timestep, another one in every epoch.

    Args:
        denoise: from `sampling.make_denoiser`, without guidance.
        scheduler: with the noise that the model was trained on.
        temperature: a sample's weight is the softmax of advantage / temperature over the batch,
            times the size of the batch.

    Returns:
        The fit; it reports nothing.
    """
    alpha_bars = jnp.asarray(scheduler.alpha_bar)

    def expand(rollouts: Rollouts, update):
        def draw(key, x_0):
            # Numbers below these have drawn the sample.
            time_key, noise_key = jax.random.split(jax.random.fold_in(key, 1_000_000 + update))
            timestep = jax.random.randint(time_key, (), 0, len(alpha_bars))
            return timestep, jax.random.normal(noise_key, x_0.shape)

        x_0 = rollouts.latents[:, -1]
        timesteps, noise = jax.vmap(draw)(rollouts.keys, x_0)
        return {
            "prompts": rollouts.prompts,
            "weights": rollouts.advantages,
            "x_0": x_0,
            "timesteps": timesteps,
            "noise": noise,
        }

    def loss(params, prompts, lora, examples):
        alpha_bar = alpha_bars[examples["timesteps"]]
        x_0, noise = examples["x_0"], examples["noise"]
        x_t = jax.vmap(scheduler.add_noise)(x_0, noise, alpha_bar)
        target = jax.vmap(scheduler.training_target)(x_0, noise, alpha_bar)
        conditioning = prompts.conditioning[examples["prompts"]]
        output = denoise(lora, x_t, (params["unet"], conditioning, examples["timesteps"]))
        errors = jnp.mean((output - target) ** 2, axis=(1, 2, 3))
        return examples["weights"] * errors, {}

    def weigh(advantages):
        return len(advantages) * jax.nn.softmax(advantages / temperature)

    return Fit(expand, 1, loss, weigh)

"""Denoising diffusion policy optimization (Black et al., arXiv 2305.13301).

Denoising is a Markov decision process: the latents are states, a step's latents the action, and the
reward of the image is that of every step on the way to it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from alignprop_jax.algorithms.rollouts import Fit, Rollouts
from alignprop_jax.diffusion.sampling import pair_with_negative
from alignprop_jax.diffusion.schedulers import DDIMScheduler


def make_ddpo_fit(
    denoise: Callable[..., Array],
    scheduler: DDIMScheduler,
    num_steps: int,
    eta: float,
    guidance_scale: float,
    clip_range: float,
    max_advantage: float,
) -> Fit:
    """Clipped policy gradient with importance weights (DDPO-IS; PPO, arXiv 1707.06347, eq. 7).

    Args:
        denoise: from `sampling.make_denoiser`, of the guidance that samples were drawn with.
        scheduler: the sampler's.
        num_steps: of the sampler, each an example.
        eta: of the sampler, above 0: a step without noise is no policy.
        clip_range: the importance weight counts within 1 - clip_range and 1 + clip_range.
        max_advantage: advantages are clipped to this on both sides.

    Returns:
        The fit; it reports "clipped", the share of examples whose weight is out of range.
    """
    steps = jax.tree.map(jnp.asarray, scheduler.plan(num_steps, eta))

    def expand(rollouts: Rollouts, update):
        del update
        examples = {
            "prompts": jnp.repeat(rollouts.prompts, num_steps),
            "advantages": jnp.repeat(rollouts.advantages, num_steps),
            "step": jnp.tile(jnp.arange(num_steps), len(rollouts.prompts)),
        }
        of_each_step = {
            "x_t": rollouts.latents[:, :-1],
            "x_prev": rollouts.latents[:, 1:],
            "log_probs": rollouts.log_probs,
        }
        return examples | {name: x.reshape(-1, *x.shape[2:]) for name, x in of_each_step.items()}

    def loss(params, prompts, lora, examples):
        at = jax.tree.map(lambda constants: constants[examples["step"]], steps)
        conditioning = pair_with_negative(
            prompts.conditioning[examples["prompts"]], prompts.uncond, guidance_scale
        )
        constants = (params["unet"], conditioning, at.timesteps)
        output = denoise(lora, examples["x_t"], constants)
        log_probs = jax.vmap(scheduler.log_prob)(output, examples["x_t"], examples["x_prev"], at)
        ratio = jnp.exp(log_probs - examples["log_probs"])
        within = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
        advantages = examples["advantages"]
        losses = jnp.maximum(-advantages * ratio, -advantages * within)
        return losses, {"clipped": (jnp.abs(ratio - 1) > clip_range).astype(jnp.float32)}

    def weigh(advantages):
        return jnp.clip(advantages, -max_advantage, max_advantage)

    return Fit(expand, num_steps, loss, weigh)

"""Denoising diffusion policy optimization (Black et al., arXiv 2305.13301).

Denoising is a Markov decision process: the states of the chain are its states, a step's next state
the action, and the reward of the sample is that of every step on the way to it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from alignprop_jax.algorithms.rollouts import Fit, FromRollouts, Rollouts
from alignprop_jax.core.chain import Chain


@dataclasses.dataclass(frozen=True)
class DDPO(FromRollouts):
    """Clipped policy gradient with importance weights (DDPO-IS; PPO, arXiv 1707.06347, eq. 7).

    It needs a chain whose steps are random: a step without noise is no policy. It reports
    "clipped", the share of examples whose weight is out of range.

    Attributes:
        clip_range: the importance weight counts within 1 - clip_range and 1 + clip_range.
        max_advantage: advantages are clipped to this on both sides.
    """

    clip_range: float
    max_advantage: float

    def fit(self, chain: Chain) -> Fit:
        generator, num_steps = chain.generator, chain.num_steps
        steps = jax.tree.map(jnp.asarray, generator.schedule(num_steps, chain.eta))

        def by_step(x):
            return x.reshape(-1, *x.shape[2:])

        def expand(rollouts: Rollouts, update):
            del update
            return {
                "prompts": jnp.repeat(rollouts.prompts, num_steps),
                "advantages": jnp.repeat(rollouts.advantages, num_steps),
                "step": jnp.tile(jnp.arange(num_steps), len(rollouts.prompts)),
                "state": jax.tree.map(lambda x: by_step(x[:, :-1]), rollouts.states),
                "next_state": jax.tree.map(lambda x: by_step(x[:, 1:]), rollouts.states),
                "log_probs": by_step(rollouts.log_probs),
            }

        def loss(params, prompts, adapter, examples):
            at = jax.tree.map(lambda constants: constants[examples["step"]], steps)
            encoded = jax.tree.map(lambda table: table[examples["prompts"]], prompts.encoded)
            paired = chain.guidance.pair(encoded, prompts.negative)
            constants = (generator.network(params), paired, at)
            prediction = chain.predict(adapter, examples["state"], constants)
            log_probs = generator.log_prob(
                prediction, examples["state"], examples["next_state"], at
            )
            ratio = jnp.exp(log_probs - examples["log_probs"])
            within = jnp.clip(ratio, 1 - self.clip_range, 1 + self.clip_range)
            advantages = examples["advantages"]
            losses = jnp.maximum(-advantages * ratio, -advantages * within)
            return losses, {"clipped": (jnp.abs(ratio - 1) > self.clip_range).astype(jnp.float32)}

        def weigh(advantages):
            return jnp.clip(advantages, -self.max_advantage, self.max_advantage)

        return Fit(expand, num_steps, loss, weigh)

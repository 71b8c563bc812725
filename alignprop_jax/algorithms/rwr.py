"""Reward-weighted regression: the model's own loss on its samples, the better ones counting more.

Lee et al., arXiv 2302.12192; RWR in Black et al., arXiv 2305.13301.
"""

import dataclasses

import jax

from alignprop_jax.algorithms.rollouts import Fit, FromRollouts, Rollouts
from alignprop_jax.core.chain import Chain

# Keys of lower numbers have drawn the sample.
_FIRST_KEY = 1_000_000


@dataclasses.dataclass(frozen=True)
class RWR(FromRollouts):
    """Denoising of samples at a random timestep, another one in every epoch, without guidance.

    Attributes:
        temperature: a sample's weight is the softmax of advantage / temperature over the batch,
            times the size of the batch.
    """

    temperature: float

    def fit(self, chain: Chain) -> Fit:
        generator = chain.generator
        unguided = dataclasses.replace(chain, guidance=generator.guidance(1.0))

        def expand(rollouts: Rollouts, update):
            fold = jax.vmap(jax.random.fold_in, (0, None))
            return {
                "prompts": rollouts.prompts,
                "weights": rollouts.advantages,
                "state": jax.tree.map(lambda x: x[:, -1], rollouts.states),
                "keys": fold(rollouts.keys, _FIRST_KEY + update),
            }

        def loss(params, prompts, adapter, examples):
            encoded = jax.tree.map(lambda table: table[examples["prompts"]], prompts.encoded)

            def predict(state, at):
                return unguided.predict(adapter, state, (generator.network(params), encoded, at))

            errors = generator.denoising_loss(predict, examples["state"], examples["keys"])
            return examples["weights"] * errors, {}

        def weigh(advantages):
            return len(advantages) * jax.nn.softmax(advantages / self.temperature)

        return Fit(expand, 1, loss, weigh)

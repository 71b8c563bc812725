"""How much better than expected an image is: rewards against earlier ones of the same prompt."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# So that a prompt whose images are all alike has advantages of 0.
_EPSILON = 1e-6


@flax.struct.dataclass
class PromptHistory:
    """The last N rewards of each of P prompts (Black et al., arXiv 2305.13301, section 4)."""

    rewards: Float[Array, "p n"]
    count: Int[Array, " p"]  # how many there were in all

    @classmethod
    def create(cls, num_prompts: int, size: int) -> "PromptHistory":
        """The history before the first reward."""
        return cls(jnp.zeros((num_prompts, size)), jnp.zeros(num_prompts, jnp.int32))

    def add(self, indices: Int[Array, " b"], rewards: Float[Array, " b"]) -> "PromptHistory":
        """The history after these rewards of the prompts `indices`, the oldest ones forgotten."""

        def add_one(history: PromptHistory, new):
            index, reward = new
            position = history.count[index] % self.rewards.shape[1]
            return PromptHistory(
                history.rewards.at[index, position].set(reward), history.count.at[index].add(1)
            ), None

        return jax.lax.scan(add_one, self, (indices, rewards))[0]

    def advantages(
        self, indices: Int[Array, " b"], rewards: Float[Array, " b"]
    ) -> Float[Array, " b"]:
        """Rewards less the mean, over the standard deviation, of their prompt's last N.

        Where a prompt has not had so many yet, those of the batch stand in.
        """
        own = self.rewards[indices]
        full = self.count[indices] >= self.rewards.shape[1]
        mean = jnp.where(full, own.mean(1), rewards.mean())
        std = jnp.where(full, own.std(1), rewards.std())
        return (rewards - mean) / (std + _EPSILON)

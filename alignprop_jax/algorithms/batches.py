"""What every algorithm does with a batch: look up prompts, draw noise, sum up rewards."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from alignprop_jax.diffusion.stable_diffusion import Conditioning
from alignprop_jax.errors import UserError

Metrics = dict[str, Array]


@flax.struct.dataclass
class PromptTable:
    """The P prompts of a run, encoded once, as the train step looks them up."""

    conditioning: Conditioning  # from the text encoders, leading axis P
    uncond: Conditioning  # the negative prompt's, leading axis 1
    reward_inputs: PyTree  # from the reward's prepare, leading axis P

    @property
    def num_prompts(self) -> int:
        """P."""
        return self.conditioning.hidden_states.shape[0]

    def rows(self, indices: Int[Array, " b"]) -> tuple[Conditioning, PyTree]:
        """Conditioning and reward inputs of some of the prompts."""
        return jax.tree.map(lambda table: table[indices], (self.conditioning, self.reward_inputs))


def count_microbatches(batch_size: int, microbatch_size: int) -> int:
    """How many microbatches a batch has, 1 for size 0; UserError unless they are of one size."""
    microbatch_size = microbatch_size or batch_size
    if batch_size % microbatch_size:
        raise UserError(
            f"train.microbatch_size is {microbatch_size}; it must divide the images of an update, "
            f"{batch_size}"
        )
    return batch_size // microbatch_size


def draw_latents(
    image_keys: Key[Array, " b"], shape: tuple[int, int, int]
) -> tuple[Float[Array, "b h w c"], Key[Array, " b"]]:
    """Standard normal noise of each image, and a key for what its sampler draws."""
    latent_keys, sampler_keys = jax.vmap(jax.random.split, out_axes=1)(image_keys)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(latent_keys), sampler_keys


def reward_metrics(scores: Float[Array, " b"], parts: dict[str, Float[Array, " b"]]) -> Metrics:
    """reward_mean and reward_std over a batch, and reward/NAME for the mean of each part."""
    return {
        "reward_mean": jnp.mean(scores),
        "reward_std": jnp.std(scores),
        **{f"reward/{name}": jnp.mean(part) for name, part in parts.items()},
    }

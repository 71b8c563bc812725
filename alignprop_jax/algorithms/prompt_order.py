"""Which prompts a step trains on."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


def prompt_indices(
    key: Key[Array, ""], step: Int[Array, ""], batch_size: int, num_prompts: int
) -> Int[Array, " b"]:
    """Deals out shuffled prompts: all of them once before any of them again, batch after batch.

    There is no state: a step's prompts follow from the key and the step alone, though a batch may
    begin in one round of the prompts and end in another.

    Args:
        key: the same at every step; each round has an order of its own.
        step: number of the step.
        batch_size: number B of prompts a step.
        num_prompts: number P of prompts there are.

    Returns:
        Indices in [0, P).
    """
    positions = step * batch_size + jnp.arange(batch_size)
    rounds = positions // num_prompts
    # As many rounds as a batch can touch, from the one it begins in.
    candidates = rounds[0] + jnp.arange((batch_size - 2) // num_prompts + 2)
    orders = jax.vmap(
        lambda number: jax.random.permutation(jax.random.fold_in(key, number), num_prompts)
    )(candidates)
    return orders[rounds - rounds[0], positions % num_prompts]

"""From rewards to the loss that is descended."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignprop_jax.errors import UserError

SHAPES = ("target", "one_minus", "negative")

Loss = Callable[[Float[Array, " b"]], Float[Array, " b"]]


def make_loss(shape: str, target: float = 0.0, scale: float = 1.0) -> Loss:
    """Builds the loss of each image from its reward r.

    Args:
        shape: "target" for scale |target - r|, which stops pushing once the target is reached;
            "one_minus" for scale (1 - r), for rewards that are a cosine; "negative" for -scale r.
            The last two differ by a constant.
        target: see `shape`.
        scale: AdamW does not see it; clipping of the gradient's norm does.

    Raises:
        UserError: for an unknown shape.
    """
    if shape == "target":
        return lambda rewards: scale * jnp.abs(target - rewards)
    if shape == "one_minus":
        return lambda rewards: scale * (1.0 - rewards)
    if shape == "negative":
        return lambda rewards: -scale * rewards
    raise UserError(f"loss.shape is {shape!r}; supported: {', '.join(SHAPES)}")

"""From the bytes of pictures to what the networks take."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def to_pixel_values(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Bytes as float32 in [-1, 1], the range of both the autoencoder and the small CLIP."""
    return images.astype(jnp.float32) / 127.5 - 1.0

"""A reward that costs next to nothing, so that sampler, decoder and update are what is timed."""

from collections.abc import Sequence

from jaxtyping import Array, Float


def redness(images: Float[Array, "b h w 3"], prompts: Sequence[str]) -> Float[Array, " b"]:
    """Mean red minus mean blue."""
    return images[..., 0].mean((1, 2)) - images[..., 2].mean((1, 2))

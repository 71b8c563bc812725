"""Residual blocks and resampling, shared by the UNet and the autoencoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignprop_jax.nn.convolution import convolve_upsampled
from alignprop_jax.nn.layers import Conv, Linear, group_norm, repeat_rows


class ResnetBlock(nn.Module):
    """Two convolutions with a residual; a time embedding, where given, is added between them.

    There is one embedding for each image, or for each run of several.
    """

    features: int
    num_groups: int
    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], time_embedding: Float[Array, "t d"] | None = None
    ) -> Float[Array, "b h w o"]:
        y = jax.nn.silu(group_norm(self.num_groups, self.epsilon, "norm1", self.dtype)(x))
        y = Conv(self.features, 3, self.dtype, name="conv1")(y)
        if time_embedding is not None:
            shift = Linear(self.features, dtype=self.dtype, name="time_emb_proj")(
                jax.nn.silu(time_embedding)
            )
            y += repeat_rows(shift, y.shape[0])[:, None, None, :]
        y = jax.nn.silu(group_norm(self.num_groups, self.epsilon, "norm2", self.dtype)(y))
        y = Conv(self.features, 3, self.dtype, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, self.dtype, name="conv_shortcut")(x)
        return x + y


class Downsample(nn.Module):
    """Halves height and width by a strided convolution.

    `pad_end_only` is the autoencoder's variant, which pads the bottom and the right edge alone.
    """

    features: int
    pad_end_only: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        padding = ((0, 1), (0, 1)) if self.pad_end_only else None
        return Conv(self.features, 3, self.dtype, stride=2, padding=padding, name="conv")(x)


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, and convolves the result."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return Conv(self.features, 3, self.dtype, by=convolve_upsampled, name="conv")(x)

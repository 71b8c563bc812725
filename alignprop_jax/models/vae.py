"""The autoencoder, images to latents and back (Rombach et al., 2022, arXiv 2112.10752)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignprop_jax.foreign_json import (
    boolean,
    check_divisible,
    integer,
    list_of,
    number,
    one_of,
    optional,
    read_fields,
    refused,
)
from alignprop_jax.models.blocks import Downsample, ResnetBlock, Upsample
from alignprop_jax.models.execution import Execution, NetworkModule
from alignprop_jax.models.layers import Conv, Linear, dot_product_attention, group_norm

# The autoencoder's norms use this epsilon; its files do not record it.
_EPSILON = 1e-6
_MAX_LEVELS = 6
_SCHEMA = {
    "act_fn": one_of("silu", "swish", default="silu"),
    "block_out_channels": list_of(integer(1, 16384), 1, _MAX_LEVELS),
    "down_block_types": optional(list_of(one_of("DownEncoderBlock2D"), 1, _MAX_LEVELS)),
    "force_upcast": boolean(default=False),
    "in_channels": one_of(3, default=3),
    "latent_channels": integer(1, 1024, default=4),
    "latents_mean": one_of(None, default=None),
    "latents_std": one_of(None, default=None),
    "layers_per_block": integer(1, 4, default=1),
    "mid_block_add_attention": one_of(True, default=True),
    "norm_num_groups": integer(1, 16384, default=32),
    "out_channels": one_of(3, default=3),
    "scaling_factor": number(1e-6, 1e6, default=0.18215),
    "shift_factor": one_of(None, default=None),
    "up_block_types": optional(list_of(one_of("UpDecoderBlock2D"), 1, _MAX_LEVELS)),
    "use_post_quant_conv": boolean(default=True),
    "use_quant_conv": boolean(default=True),
}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The architecture, `channels` from the highest resolution to the lowest.

    `force_upcast` tells that activations overflow float16.
    """

    in_channels: int = 3
    out_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    force_upcast: bool = False

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Reads diffusers' AutoencoderKL config.json; UserError where it is not supported."""
        values = read_fields(config, _SCHEMA)
        channels = values["block_out_channels"]
        for key in ("down_block_types", "up_block_types"):
            if len(values[key] or channels) != len(channels):
                raise refused(
                    key, values[key], f"{len(channels)} values, as many as block_out_channels has"
                )
        check_divisible(
            "block_out_channels", channels, "norm_num_groups", values["norm_num_groups"]
        )
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(channels=channels, **{key: values[key] for key in names & values.keys()})

    @property
    def downscale(self) -> int:
        """Pixels along a side for each latent."""
        return 2 ** (len(self.channels) - 1)


class PixelAttention(NetworkModule):
    """Single-head self-attention over the pixels of a feature map, with a residual."""

    num_groups: int
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape
        y = group_norm(self.num_groups, _EPSILON, "group_norm", self.dtype)(x)
        y = y.reshape(batch, height * width, channels)
        query, key, value = (
            Linear(channels, dtype=self.dtype, name=name)(y) for name in ("to_q", "to_k", "to_v")
        )
        y = dot_product_attention(query, key, value, 1, self.execution.attend)
        y = Linear(channels, dtype=self.dtype, name="to_out.0")(y)
        return x + y.reshape(x.shape)


class MidBlock(NetworkModule):
    config: VAEConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        groups = self.config.norm_num_groups
        x = self.block(ResnetBlock)(x.shape[-1], groups, _EPSILON, self.dtype, name="resnets.0")(x)
        x = PixelAttention(groups, self.execution, name="attentions.0")(x)
        return self.block(ResnetBlock)(x.shape[-1], groups, _EPSILON, self.dtype, name="resnets.1")(
            x
        )


class EncoderLevel(NetworkModule):
    """Residual blocks of one resolution, downsampled at the end unless it is the lowest."""

    config: VAEConfig
    level: int
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        config = self.config
        features = config.channels[self.level]
        for i in range(config.layers_per_block):
            x = self.block(ResnetBlock)(
                features,
                config.norm_num_groups,
                _EPSILON,
                self.dtype,
                name=f"resnets.{i}",
            )(x)
        if self.level + 1 < len(config.channels):
            x = Downsample(features, pad_end_only=True, dtype=self.dtype, name="downsamplers.0")(x)
        return x


class DecoderLevel(NetworkModule):
    """Residual blocks of one resolution, upsampled at the end unless it is the highest."""

    config: VAEConfig
    level: int
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        config = self.config
        features = config.channels[self.level]
        for i in range(config.layers_per_block + 1):
            x = self.block(ResnetBlock)(
                features,
                config.norm_num_groups,
                _EPSILON,
                self.dtype,
                name=f"resnets.{i}",
            )(x)
        if self.level > 0:
            x = Upsample(features, self.dtype, name="upsamplers.0")(x)
        return x


class Encoder(NetworkModule):
    config: VAEConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w o"]:
        config = self.config
        x = Conv(config.channels[0], 3, self.dtype, name="conv_in")(x)
        for level in range(len(config.channels)):
            x = EncoderLevel(config, level, self.execution, name=f"down_blocks.{level}")(x)
        x = MidBlock(config, self.execution, name="mid_block")(x)
        x = group_norm(config.norm_num_groups, _EPSILON, "conv_norm_out", self.dtype)(x)
        return Conv(2 * config.latent_channels, 3, self.dtype, name="conv_out")(jax.nn.silu(x))


class Decoder(NetworkModule):
    config: VAEConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, z: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        config = self.config
        x = Conv(config.channels[-1], 3, self.dtype, name="conv_in")(z)
        x = MidBlock(config, self.execution, name="mid_block")(x)
        for i, level in enumerate(reversed(range(len(config.channels)))):
            x = DecoderLevel(config, level, self.execution, name=f"up_blocks.{i}")(x)
        x = group_norm(config.norm_num_groups, _EPSILON, "conv_norm_out", self.dtype)(x)
        return Conv(config.out_channels, 3, self.dtype, name="conv_out")(jax.nn.silu(x))


class AutoencoderKL(NetworkModule):
    """Images in [-1, 1] to the mean and log-variance of latents, and latents to images."""

    config: VAEConfig
    execution: Execution = Execution()

    def setup(self):
        config = self.config
        self.encoder = Encoder(config, self.execution)
        self.decoder = Decoder(config, self.execution)
        if config.use_quant_conv:
            moments = 2 * config.latent_channels
            self.quant_conv = Conv(moments, 1, self.dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(config.latent_channels, 1, self.dtype)

    def encode(
        self, x: Float[Array, "b H W c"]
    ) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
        """Mean and log-variance of the latents, before the scaling factor."""
        moments = self.encoder(x)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        """The image of latents that were already divided by the scaling factor."""
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z)

    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b H W c"]:
        """Reconstructs from the mean: what init() needs to see every parameter."""
        return self.decode(self.encode(x)[0])

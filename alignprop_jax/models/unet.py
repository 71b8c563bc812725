"""The denoising UNet of Stable Diffusion.

Of 1.x and 2.x (Rombach et al., 2022, arXiv 2112.10752) and XL (Podell et al., 2023, arXiv
2307.01952).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from alignprop_jax.foreign_json import (
    Field,
    boolean,
    check_divisible,
    either,
    integer,
    list_of,
    number,
    one_of,
    optional,
    read_fields,
    refused,
)
from alignprop_jax.models.attention import Transformer2D
from alignprop_jax.models.blocks import Downsample, ResnetBlock, Upsample
from alignprop_jax.models.execution import Execution, NetworkModule
from alignprop_jax.models.layers import Conv, Linear, group_norm, repeat_rows

# What leaves the architecture as it is here; the first is what a file without the key means.
_ONLY = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1.0, 1),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0, 1),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
# Heights and widths: of the picture a training image was made from, of where it was cropped, and
# of the image.
NUM_TIME_IDS = 6
# Block types, and whether they have transformers.
_DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
_MAX_LEVELS = 6
_WIDTH = integer(1, 16384)
_HEADS = integer(1, 1024)


def _per_level(item: Field, default: Any) -> Field:
    return either(item, list_of(item, 1, _MAX_LEVELS), default)


_SCHEMA = {
    **{key: one_of(*values, default=values[0]) for key, values in _ONLY.items()},
    "addition_embed_type": one_of(None, "text_time", default=None),
    "addition_time_embed_dim": optional(_WIDTH),
    "attention_head_dim": _per_level(_HEADS, default=8),
    "block_out_channels": list_of(_WIDTH, 1, _MAX_LEVELS),
    "cross_attention_dim": integer(1, 16384, default=1280),
    "down_block_types": list_of(
        one_of(*_DOWN_BLOCKS),
        1,
        _MAX_LEVELS,
        default=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    ),
    "flip_sin_to_cos": boolean(default=True),
    "freq_shift": number(0, 1, default=0.0),
    "in_channels": integer(1, 1024, default=4),
    "layers_per_block": _per_level(integer(1, 4), default=2),
    "norm_eps": number(1e-12, 1, default=1e-5),
    "norm_num_groups": integer(1, 16384, default=32),
    "num_attention_heads": optional(_per_level(_HEADS, default=None)),
    "out_channels": integer(1, 1024, default=4),
    "projection_class_embeddings_input_dim": optional(_WIDTH),
    "sample_size": optional(integer(1, 1024, default=64)),
    "transformer_layers_per_block": _per_level(integer(1, 64), default=1),
    "up_block_types": list_of(
        one_of(*_UP_BLOCKS),
        1,
        _MAX_LEVELS,
        default=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ),
    "use_linear_projection": boolean(default=False),
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The architecture, one entry a level of resolution from the highest to the lowest.

    `num_heads` counts attention heads; diffusers' files call it `attention_head_dim`, a misnomer
    kept for compatibility there. `down_attention[i]` and `up_attention[i]` tell whether block i, in
    the order of execution, has transformers. `size_embedding_dim` is the width of the sinusoids of
    each number in `time_ids` and `pooled_dim` that of the pooled text; 0 for a model that is told
    neither.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    transformer_layers: tuple[int, ...] = (1, 1, 1, 1)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    down_attention: tuple[bool, ...] = (True, True, True, False)
    up_attention: tuple[bool, ...] = (False, True, True, True)
    context_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    size_embedding_dim: int = 0
    pooled_dim: int = 0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Reads diffusers' UNet2DConditionModel config.json; UserError where not supported."""
        values = read_fields(config, _SCHEMA)
        channels = values["block_out_channels"]
        levels = len(channels)

        def per_level(key):
            value = values[key]
            if not isinstance(value, tuple):
                return (value,) * levels
            if len(value) != levels:
                raise refused(key, value, f"{levels} values, as many as block_out_channels has")
            return value

        size_dim = pooled_dim = 0
        if values["addition_embed_type"]:
            size_dim = values["addition_time_embed_dim"]
            key = "projection_class_embeddings_input_dim"
            if size_dim is None:
                raise refused("addition_time_embed_dim", None, _WIDTH.allowed)
            if (values[key] or 0) <= NUM_TIME_IDS * size_dim:
                raise refused(
                    key, values[key], f"more than {NUM_TIME_IDS} times addition_time_embed_dim"
                )
            pooled_dim = values[key] - NUM_TIME_IDS * size_dim

        # diffusers' files set the count of heads under the second name, as if it were their size.
        heads = "num_attention_heads" if values["num_attention_heads"] else "attention_head_dim"
        unet = cls(
            sample_size=values["sample_size"],
            in_channels=values["in_channels"],
            out_channels=values["out_channels"],
            channels=channels,
            layers_per_block=per_level("layers_per_block"),
            transformer_layers=per_level("transformer_layers_per_block"),
            num_heads=per_level(heads),
            down_attention=tuple(map(_DOWN_BLOCKS.get, per_level("down_block_types"))),
            up_attention=tuple(map(_UP_BLOCKS.get, per_level("up_block_types"))),
            context_dim=values["cross_attention_dim"],
            norm_num_groups=values["norm_num_groups"],
            norm_eps=values["norm_eps"],
            use_linear_projection=values["use_linear_projection"],
            flip_sin_to_cos=values["flip_sin_to_cos"],
            freq_shift=values["freq_shift"],
            size_embedding_dim=size_dim,
            pooled_dim=pooled_dim,
        )
        check_divisible("block_out_channels", channels, "norm_num_groups", unet.norm_num_groups)
        # The middle has transformers whatever the lowest level has.
        attention = zip(unet.down_attention, unet.up_attention[::-1], strict=True)
        for level, (down, up) in enumerate(attention):
            if down or up or level == levels - 1:
                check_divisible(
                    "block_out_channels", channels[level : level + 1], heads, unet.num_heads[level]
                )
        for key, width in (
            ("block_out_channels", channels[0]),
            ("addition_time_embed_dim", size_dim or channels[0]),
        ):
            if width // 2 <= unet.freq_shift:
                raise refused(key, width, "more than twice freq_shift")
        return unet


def timestep_embedding(
    timesteps: Shaped[Array, " b"], dim: int, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "b d"]:
    """Sinusoids of the timestep at geometrically spaced frequencies.

    Vaswani et al., 2017, section 3.5.
    """
    half = dim // 2
    # A constant: late timesteps make a rounding of it a thousand times as large, and compiled
    # programs that round differently would not agree on the angle.
    frequencies = np.exp(-np.log(10000.0) * np.arange(half) / (half - freq_shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)[None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    embedding = jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim - 2 * half)))


class TimestepMLP(nn.Module):
    """The two layers that turn sinusoids into the embedding every residual block sees."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b t"]:
        hidden = jax.nn.silu(Linear(self.features, dtype=self.dtype, name="linear_1")(x))
        return Linear(self.features, dtype=self.dtype, name="linear_2")(hidden)


class Stage(NetworkModule):
    """Residual blocks of one resolution, each followed by a transformer if `attention` is set."""

    config: UNetConfig
    level: int
    attention: bool
    execution: Execution = Execution()

    def resnet(self, index: int) -> ResnetBlock:
        return self.block(ResnetBlock)(
            self.config.channels[self.level],
            self.config.norm_num_groups,
            self.config.norm_eps,
            self.dtype,
            name=f"resnets.{index}",
        )

    def transformer(self, index: int) -> Transformer2D:
        return Transformer2D(
            self.config.num_heads[self.level],
            self.config.transformer_layers[self.level],
            self.config.norm_num_groups,
            self.config.use_linear_projection,
            self.execution,
            name=f"attentions.{index}",
        )


class DownStage(Stage):
    """Returns the result and its skip connections; downsamples at the end unless lowest."""

    @nn.compact
    def __call__(self, x, time_embedding, context):
        skips = []
        for i in range(self.config.layers_per_block[self.level]):
            x = self.resnet(i)(x, time_embedding)
            if self.attention:
                x = self.transformer(i)(x, context)
            skips.append(x)
        if self.level + 1 < len(self.config.channels):
            x = Downsample(x.shape[-1], dtype=self.dtype, name="downsamplers.0")(x)
            skips.append(x)
        return x, skips


class MidStage(Stage):
    @nn.compact
    def __call__(self, x, time_embedding, context):
        x = self.resnet(0)(x, time_embedding)
        x = self.transformer(0)(x, context)
        return self.resnet(1)(x, time_embedding)


class UpStage(Stage):
    """Takes one skip connection a residual block, the last first; upsamples unless highest."""

    @nn.compact
    def __call__(self, x, skips, time_embedding, context):
        for i, skip in enumerate(reversed(skips)):
            skip = repeat_rows(skip, x.shape[0])
            x = self.resnet(i)(jnp.concatenate([x, skip], axis=-1), time_embedding)
            if self.attention:
                x = self.transformer(i)(x, context)
        if self.level > 0:
            x = Upsample(x.shape[-1], dtype=self.dtype, name="upsamplers.0")(x)
        return x


class UNet(NetworkModule):
    """Predicts the noise (or v) in noisy latents, given the timestep and the encoded prompt."""

    config: UNetConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: Shaped[Array, "..."],
        encoder_hidden_states: Float[Array, "n l d"],
        pooled: Float[Array, "n p"] | None = None,
        time_ids: Float[Array, "n 6"] | None = None,
    ) -> Float[Array, "n h w o"]:
        """Evaluates the network.

        There may be several prompts n for each image b, one after the other, as for guidance. What
        comes before the first attention to the prompt is the same for them, and evaluated once.

        Args:
            sample: noisy latents; height and width divisible by 2 ** (levels - 1).
            timesteps: one timestep an image, or one for all as a scalar.
            encoder_hidden_states: the text encoder's hidden states.
            pooled: the pooled text, for Stable Diffusion XL alone, as the next.
            time_ids: original height and width, top and left of the crop, target height and width,
                in pixels (Podell et al., section 2.2).

        Returns:
            The prediction, in the compute dtype.
        """
        config = self.config
        levels = len(config.channels)
        # One for each image, even where all are the same: what DDPO weighs is how one evaluation
        # departs from another, which had better round alike.
        timesteps = jnp.broadcast_to(timesteps, sample.shape[:1])
        sinusoids = timestep_embedding(
            timesteps, config.channels[0], config.flip_sin_to_cos, config.freq_shift
        )
        time_embedding = TimestepMLP(4 * config.channels[0], self.dtype, name="time_embedding")(
            sinusoids
        )
        if config.size_embedding_dim:
            # The embedding is the prompt's, and so is everything from here on.
            sample = repeat_rows(sample, encoder_hidden_states.shape[0])
            sizes = timestep_embedding(
                time_ids.reshape(-1),
                config.size_embedding_dim,
                config.flip_sin_to_cos,
                config.freq_shift,
            ).reshape(time_ids.shape[0], -1)
            size_embedding = TimestepMLP(4 * config.channels[0], self.dtype, name="add_embedding")(
                jnp.concatenate([pooled, sizes], axis=-1)
            )
            time_embedding = repeat_rows(time_embedding, sample.shape[0]) + size_embedding
        context = encoder_hidden_states.astype(self.dtype)

        x = Conv(config.channels[0], 3, self.dtype, name="conv_in")(sample)
        skips = [x]
        for level in range(levels):
            stage = DownStage(
                config,
                level,
                config.down_attention[level],
                self.execution,
                name=f"down_blocks.{level}",
            )
            x, kept = stage(x, time_embedding, context)
            skips += kept
        x = MidStage(config, levels - 1, True, self.execution, name="mid_block")(
            x, time_embedding, context
        )
        for i, level in enumerate(reversed(range(levels))):
            stage = UpStage(
                config, level, config.up_attention[i], self.execution, name=f"up_blocks.{i}"
            )
            split = len(skips) - config.layers_per_block[level] - 1
            x = stage(x, skips[split:], time_embedding, context)
            skips = skips[:split]
        x = group_norm(config.norm_num_groups, config.norm_eps, "conv_norm_out", self.dtype)(x)
        return Conv(config.out_channels, 3, self.dtype, name="conv_out")(jax.nn.silu(x))

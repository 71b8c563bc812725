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

from alignprop_jax.models.attention import Transformer2D
from alignprop_jax.models.blocks import Downsample, ResnetBlock, Upsample
from alignprop_jax.models.config_json import per_block, refuse_unsupported
from alignprop_jax.models.execution import Execution, NetworkModule
from alignprop_jax.models.layers import Conv, Linear, group_norm, repeat_rows

_SUPPORTED = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1, 1.0),
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
_BLOCKS = {
    "down_block_types": {"CrossAttnDownBlock2D": True, "DownBlock2D": False},
    "up_block_types": {"CrossAttnUpBlock2D": True, "UpBlock2D": False},
}
_DEFAULT_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
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
        refuse_unsupported(config, _SUPPORTED, "UNet")
        channels = tuple(config["block_out_channels"])
        levels = len(channels)

        def per_level(key, default):
            return per_block(key, config.get(key, default), levels)

        def attention(key):
            blocks = per_level(key, _DEFAULT_BLOCKS[key])
            for block in blocks:
                refuse_unsupported({key: block}, {key: tuple(_BLOCKS[key])}, "UNet")
            return tuple(_BLOCKS[key][block] for block in blocks)

        size_dim = pooled_dim = 0
        if config.get("addition_embed_type") == "text_time":
            size_dim = config["addition_time_embed_dim"]
            pooled_dim = config["projection_class_embeddings_input_dim"] - NUM_TIME_IDS * size_dim

        # diffusers' files set the count of heads under the second name, as if it were their size.
        heads = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
        return cls(
            sample_size=config.get("sample_size") or 64,
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            channels=channels,
            layers_per_block=per_level("layers_per_block", 2),
            transformer_layers=per_level("transformer_layers_per_block", 1),
            num_heads=per_level(heads, 8),
            down_attention=attention("down_block_types"),
            up_attention=attention("up_block_types"),
            context_dim=config.get("cross_attention_dim", 1280),
            norm_num_groups=config.get("norm_num_groups", 32),
            norm_eps=config.get("norm_eps", 1e-5),
            use_linear_projection=config.get("use_linear_projection", False),
            flip_sin_to_cos=config.get("flip_sin_to_cos", True),
            freq_shift=config.get("freq_shift", 0.0),
            size_embedding_dim=size_dim,
            pooled_dim=pooled_dim,
        )


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

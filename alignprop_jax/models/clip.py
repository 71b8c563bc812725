"""CLIP's text and vision towers (Radford et al., 2021, arXiv 2103.00020)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignprop_jax.foreign_json import (
    Schema,
    check_divisible,
    integer,
    number,
    one_of,
    optional,
    read_fields,
    refused,
    section,
)
from alignprop_jax.models.attention_functions import attend
from alignprop_jax.models.execution import Execution, NetworkModule, rematerialized
from alignprop_jax.models.layers import ACTIVATIONS, Linear, dot_product_attention, layer_norm
from alignprop_jax.models.stacked_layers import EVERY, run_layers

TOWERS: Schema = {key: optional(section(default={})) for key in ("text_config", "vision_config")}
"""The configs within that of a model with both towers."""

_PROJECTION_DIM = integer(1, 16384, default=512)
# Along a side of the image; the largest models that are published have 72.
_MAX_PATCHES = 256


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """What the two towers have in common."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    hidden_act: str
    layer_norm_eps: float

    @staticmethod
    def read(
        config: Mapping[str, Any], hidden_size: int, num_heads: int, prefix: str
    ) -> dict[str, Any]:
        """The common fields of a transformers config, whose files may leave out defaults."""
        values = read_fields(
            config,
            {
                "hidden_size": integer(1, 16384, default=hidden_size),
                "intermediate_size": optional(integer(1, 65536)),
                "num_hidden_layers": integer(1, 256, default=12),
                "num_attention_heads": integer(1, 1024, default=num_heads),
                "hidden_act": one_of(*ACTIVATIONS, default="quick_gelu"),
                "layer_norm_eps": number(1e-12, 1, default=1e-5),
            },
            prefix,
        )
        hidden_size, num_heads = values["hidden_size"], values["num_attention_heads"]
        check_divisible(
            f"{prefix}hidden_size", [hidden_size], f"{prefix}num_attention_heads", num_heads
        )
        return {
            "hidden_size": hidden_size,
            "intermediate_size": values["intermediate_size"] or 4 * hidden_size,
            "num_layers": values["num_hidden_layers"],
            "num_heads": num_heads,
            "hidden_act": values["hidden_act"],
            "layer_norm_eps": values["layer_norm_eps"],
        }


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(TransformerConfig):
    vocab_size: int
    max_length: int
    eos_token_id: int
    projection_dim: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], prefix: str = "") -> "CLIPTextConfig":
        """Reads transformers' CLIPTextConfig; UserError where it is not supported.

        Args:
            prefix: of the keys in errors, for a config within another.
        """
        values = read_fields(
            config,
            {
                "vocab_size": integer(1, 2**20, default=49408),
                "max_position_embeddings": integer(1, 4096, default=77),
                "eos_token_id": integer(0, 2**20, default=49407),
                "projection_dim": _PROJECTION_DIM,
            },
            prefix,
        )
        return cls(
            **cls.read(config, 512, 8, prefix),
            vocab_size=values["vocab_size"],
            max_length=values["max_position_embeddings"],
            eos_token_id=values["eos_token_id"],
            projection_dim=values["projection_dim"],
        )


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(TransformerConfig):
    image_size: int
    patch_size: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], prefix: str = "") -> "CLIPVisionConfig":
        """Reads transformers' CLIPVisionConfig, as `CLIPTextConfig.from_dict` reads its own."""
        values = read_fields(
            config,
            {
                "image_size": integer(1, 4096, default=224),
                "num_channels": one_of(3, default=3),
                "patch_size": integer(1, 4096, default=32),
            },
            prefix,
        )
        image_size, patch_size = values["image_size"], values["patch_size"]
        if not 1 <= image_size // patch_size <= _MAX_PATCHES:
            raise refused(
                f"{prefix}patch_size",
                patch_size,
                f"a size that fits 1 to {_MAX_PATCHES} times into image_size={image_size}",
            )
        return cls(
            **cls.read(config, 768, 12, prefix), image_size=image_size, patch_size=patch_size
        )


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    text: CLIPTextConfig
    vision: CLIPVisionConfig
    projection_dim: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPConfig":
        """Reads transformers' CLIPConfig; UserError where it is not supported."""
        values = read_fields(config, {**TOWERS, "projection_dim": _PROJECTION_DIM})
        return cls(
            text=CLIPTextConfig.from_dict(values["text_config"], "text_config."),
            vision=CLIPVisionConfig.from_dict(values["vision_config"], "vision_config."),
            projection_dim=values["projection_dim"],
        )


class SelfAttention(NetworkModule):
    config: TransformerConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "l l"] | None
    ) -> Float[Array, "b l d"]:
        query, key, value = (
            Linear(self.config.hidden_size, dtype=self.dtype, name=name)(x)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        # Texts are short, and only they have a mask.
        attend_as = self.execution.attend if mask is None else functools.partial(attend, mask=mask)
        out = dot_product_attention(query, key, value, self.config.num_heads, attend_as)
        return Linear(self.config.hidden_size, dtype=self.dtype, name="out_proj")(out)


class MLP(NetworkModule):
    config: TransformerConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        hidden = Linear(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)
        hidden = ACTIVATIONS[self.config.hidden_act](hidden)
        return Linear(self.config.hidden_size, dtype=self.dtype, name="fc2")(hidden)


class EncoderLayer(NetworkModule):
    """Pre-norm self-attention and MLP, each with a residual."""

    config: TransformerConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "l l"] | None
    ) -> Float[Array, "b l d"]:
        def norm(name):
            return layer_norm(self.config.layer_norm_eps, name, self.dtype)

        x = x + SelfAttention(self.config, self.execution, name="self_attn")(
            norm("layer_norm1")(x), mask
        )
        return x + MLP(self.config, self.execution, name="mlp")(norm("layer_norm2")(x))


class Encoder(NetworkModule):
    """The layers; returns the states after the last of them, and those before it."""

    config: TransformerConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "l l"] | None = None
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"]]:
        def apply(layer, states, mask):
            x, _ = states
            return layer(x, mask), x

        # Of a loop, every turn would keep all that its gradient needs, 37 MB an image and layer of
        # a ViT-H in bfloat16, where 1.3 will do. Beside the denoising that comes before a reward, a
        # second forward pass is little.
        layer = rematerialized(EncoderLayer)(self.config, self.execution, name=f"layers{EVERY}")
        return run_layers(apply, layer, self.config.num_layers, (x, x), mask)


class TextEmbeddings(NetworkModule):
    config: CLIPTextConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        config = self.config
        tokens = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            name="token_embedding",
        )
        positions = nn.Embed(
            config.max_length,
            config.hidden_size,
            dtype=self.dtype,
            name="position_embedding",
        )
        return tokens(input_ids) + positions(jnp.arange(input_ids.shape[1]))[None]


class TextStates(NamedTuple):
    """What a text tower makes of token ids.

    Attributes:
        last: the hidden states after the last layer, normalised.
        penultimate: those before the last layer, as they are.
        pooled: the one of `last` at the end of the text, projected where the model projects it.
    """

    last: Float[Array, "b l d"]
    penultimate: Float[Array, "b l d"]
    pooled: Float[Array, "b p"]


class TextTransformer(NetworkModule):
    """The causal text tower."""

    config: CLIPTextConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, input_ids: Int[Array, "b l"]) -> TextStates:
        config = self.config
        length = input_ids.shape[1]
        causal = jnp.tri(length, dtype=bool)
        x = TextEmbeddings(config, self.execution, name="embeddings")(input_ids)
        x, penultimate = Encoder(config, self.execution, name="encoder")(x, causal)
        x = layer_norm(config.layer_norm_eps, "final_layer_norm", self.dtype)(x)
        if config.eos_token_id == 2:
            # OpenAI's files carry this id by mistake; their end of text is the highest id there is.
            end = jnp.argmax(input_ids, axis=-1)
        else:
            end = jnp.argmax(input_ids == config.eos_token_id, axis=-1)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return TextStates(x, penultimate, pooled)


class VisionEmbeddings(NetworkModule):
    config: CLIPVisionConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "b h w c"]) -> Float[Array, "b l d"]:
        config = self.config
        patches = nn.Conv(
            config.hidden_size,
            (config.patch_size, config.patch_size),
            strides=config.patch_size,
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            name="patch_embedding",
        )(pixel_values)
        batch, height, width, channels = patches.shape
        patches = patches.reshape(batch, height * width, channels)
        class_embedding = self.param(
            "class_embedding", nn.initializers.normal(0.02), (config.hidden_size,)
        )
        first = jnp.broadcast_to(
            class_embedding.astype(self.dtype)[None, None], (batch, 1, channels)
        )
        x = jnp.concatenate([first, patches], axis=1)
        positions = nn.Embed(
            (config.image_size // config.patch_size) ** 2 + 1,
            config.hidden_size,
            dtype=self.dtype,
            name="position_embedding",
        )
        return x + positions(jnp.arange(x.shape[1]))[None]


class VisionTransformer(NetworkModule):
    """The vision tower: last hidden states, and the normalised state of the class token."""

    config: CLIPVisionConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, pixel_values: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b d"]]:
        epsilon = self.config.layer_norm_eps
        x = VisionEmbeddings(self.config, self.execution, name="embeddings")(pixel_values)
        # The misspelling is the weights' own.
        x = layer_norm(epsilon, "pre_layrnorm", self.dtype)(x)
        x, _ = Encoder(self.config, self.execution, name="encoder")(x)
        return x, layer_norm(epsilon, "post_layernorm", self.dtype)(x[:, 0])


class CLIPTextModel(NetworkModule):
    """The text tower alone: what conditions Stable Diffusion."""

    config: CLIPTextConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, input_ids: Int[Array, "b l"]) -> TextStates:
        return TextTransformer(self.config, self.execution, name="text_model")(input_ids)


class CLIPTextModelWithProjection(NetworkModule):
    """The text tower and its projection: the second text encoder of Stable Diffusion XL."""

    config: CLIPTextConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, input_ids: Int[Array, "b l"]) -> TextStates:
        states = TextTransformer(self.config, self.execution, name="text_model")(input_ids)
        project = Linear(
            self.config.projection_dim,
            use_bias=False,
            dtype=self.dtype,
            name="text_projection",
        )
        return states._replace(pooled=project(states.pooled))


class CLIPModel(NetworkModule):
    """Both towers, with projections into the space where they are compared."""

    config: CLIPConfig
    execution: Execution = Execution()

    def setup(self):
        config = self.config
        self.text_model = TextTransformer(config.text, self.execution)
        self.vision_model = VisionTransformer(config.vision, self.execution)
        self.text_projection = Linear(config.projection_dim, use_bias=False, dtype=self.dtype)
        self.visual_projection = Linear(config.projection_dim, use_bias=False, dtype=self.dtype)
        # The logarithm of the inverse temperature, 1 / 0.07 at first (Radford et al., section 2.3).
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def get_text_features(self, input_ids: Int[Array, "b l"]) -> Float[Array, "b p"]:
        """Text embeddings, not normalised."""
        return self.text_projection(self.text_model(input_ids).pooled)

    def get_image_features(self, pixel_values: Float[Array, "b h w c"]) -> Float[Array, "b p"]:
        """Embeddings, not normalised, of images resized and normalised for CLIP."""
        return self.visual_projection(self.vision_model(pixel_values)[1])

    def __call__(
        self, input_ids: Int[Array, "t l"], pixel_values: Float[Array, "i h w c"]
    ) -> Float[Array, "i t"]:
        """exp(logit_scale) times the cosine between every image and every text."""
        text = self.get_text_features(input_ids)
        image = self.get_image_features(pixel_values)
        text /= jnp.linalg.norm(text, axis=-1, keepdims=True)
        image /= jnp.linalg.norm(image, axis=-1, keepdims=True)
        return jnp.exp(self.logit_scale) * image @ text.T

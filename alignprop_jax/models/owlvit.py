"""OWL-ViT and OWLv2: open-vocabulary detectors on CLIP's towers.

Every patch of the image proposes one box, whose class is its agreement with the embedded text
queries (Minderer et al., arXiv 2205.06230). OWLv2 is the same network, with a further head that
says how likely a box holds any object at all (arXiv 2306.09683).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alignprop_jax.foreign_json import one_of, read_fields
from alignprop_jax.models.clip import (
    TOWERS,
    CLIPConfig,
    CLIPVisionConfig,
    Encoder,
    TextTransformer,
    VisionEmbeddings,
)
from alignprop_jax.models.execution import Execution, NetworkModule
from alignprop_jax.models.layers import Linear, gelu, layer_norm

# What config.json may leave out and what a CLIP would have otherwise.
_MAX_LENGTH = 16
_VISION_CONFIGS = {
    "owlvit": {"image_size": 768, "patch_size": 32},
    "owlv2": {"image_size": 768, "patch_size": 16},
}


@dataclasses.dataclass(frozen=True)
class OwlViTConfig(CLIPConfig):
    model_type: str

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "OwlViTConfig":
        """Reads transformers' OwlViTConfig or Owlv2Config.

        Raises:
            UserError: it is neither, or asks for what is not implemented.
        """
        values = read_fields(config, {**TOWERS, "model_type": one_of(*_VISION_CONFIGS)})
        model_type = values["model_type"]
        text = {"max_position_embeddings": _MAX_LENGTH, **values["text_config"]}
        # Whatever the file says, the text ends at its highest id: what 2 stands for in a CLIP.
        text["eos_token_id"] = 2
        vision = {**_VISION_CONFIGS[model_type], **values["vision_config"]}
        clip = CLIPConfig.from_dict({**config, "text_config": text, "vision_config": vision})
        return cls(clip.text, clip.vision, clip.projection_dim, model_type)


class Detections(NamedTuple):
    """What the P patches of each image propose.

    Attributes:
        boxes: centre x and y, width and height, as shares of the input's edge.
        logits: of the box holding what each of the Q queries names; a sigmoid makes them scores.
        objectness: logits of the box holding any object, without a gradient by the image, as they
            are trained; None for OWL-ViT, which has no such head.
    """

    boxes: Float[Array, "b p 4"]
    logits: Float[Array, "b p q"]
    objectness: Float[Array, "b p"] | None


class VisionTower(NetworkModule):
    """CLIP's vision tower with every token normalised at the end, not the class token alone."""

    config: CLIPVisionConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "b h w 3"]) -> Float[Array, "b l d"]:
        epsilon = self.config.layer_norm_eps
        x = VisionEmbeddings(self.config, self.execution, name="embeddings")(pixel_values)
        x = layer_norm(epsilon, "pre_layernorm", self.dtype)(x)
        x, _ = Encoder(self.config, self.execution, name="encoder")(x)
        return layer_norm(epsilon, "post_layernorm", self.dtype)(x)


class Towers(NetworkModule):
    """The CLIP in a detector, which uses neither its `visual_projection` nor its scale."""

    config: OwlViTConfig
    execution: Execution = Execution()

    def setup(self):
        config = self.config
        self.text_model = TextTransformer(config.text, self.execution)
        self.vision_model = VisionTower(config.vision, self.execution)
        self.text_projection = Linear(config.projection_dim, use_bias=False, dtype=self.dtype)
        self.visual_projection = Linear(config.projection_dim, use_bias=False, dtype=self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def text(self, input_ids: Int[Array, "q l"]) -> Float[Array, "q p"]:
        """Text embeddings of length 1."""
        embeddings = self.text_projection(self.text_model(input_ids).pooled).astype(jnp.float32)
        return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)

    def image(self, pixel_values: Float[Array, "b h w 3"]) -> Float[Array, "b l d"]:
        """States of the class token and of the patches."""
        tokens = self.vision_model(pixel_values)
        if self.is_initializing():
            # Without a call it would have no weights, and the file's no place.
            self.visual_projection(tokens)
        return tokens


class ClassHead(NetworkModule):
    """(cosine + shift) scale for every patch and query, both learnt functions of the patch."""

    projection_dim: int
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, features: Float[Array, "b p d"], queries: Float[Array, "b q e"]
    ) -> Float[Array, "b p q"]:
        def linear(width, name):
            return Linear(width, dtype=self.dtype, name=name)(features).astype(jnp.float32)

        def normalize(x):
            return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)

        classes = normalize(linear(self.projection_dim, "dense0"))
        cosine = jnp.einsum("bpe,bqe->bpq", classes, normalize(queries))
        scale = jax.nn.elu(linear(1, "logit_scale")) + 1
        return (cosine + linear(1, "logit_shift")) * scale


class BoxHead(NetworkModule):
    """Three linear layers, as wide as the features but for the last."""

    out_features: int
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, features: Float[Array, "b p d"]) -> Float[Array, "b p o"]:
        width = features.shape[-1]
        x = gelu(Linear(width, dtype=self.dtype, name="dense0")(features))
        x = gelu(Linear(width, dtype=self.dtype, name="dense1")(x))
        return Linear(self.out_features, dtype=self.dtype, name="dense2")(x).astype(jnp.float32)


class OwlViT(NetworkModule):
    """transformers' OwlViTForObjectDetection or Owlv2ForObjectDetection."""

    config: OwlViTConfig
    execution: Execution = Execution()

    def setup(self):
        config = self.config
        # In the files the towers bear the model's name.
        setattr(self, config.model_type, Towers(config, self.execution))
        self.layer_norm = layer_norm(config.vision.layer_norm_eps, None, self.dtype)
        self.class_head = ClassHead(config.projection_dim, self.execution)
        self.box_head = BoxHead(4, self.execution)
        if config.model_type == "owlv2":
            self.objectness_head = BoxHead(1, self.execution)

    def embed_queries(self, input_ids: Int[Array, "q l"]) -> Float[Array, "q e"]:
        """Text queries as `detect` takes them."""
        return getattr(self, self.config.model_type).text(input_ids)

    def detect(
        self, pixel_values: Float[Array, "b h w 3"], queries: Float[Array, "b q e"]
    ) -> Detections:
        """Looks for each image's own queries.

        Args:
            pixel_values: images resized and normalised for the detector.
            queries: of each image, from `embed_queries`.
        """
        tokens = getattr(self, self.config.model_type).image(pixel_values)
        features = self.layer_norm(tokens[:, 1:] * tokens[:, :1])
        vision = self.config.vision
        bias = _box_bias(vision.image_size // vision.patch_size)
        boxes = jax.nn.sigmoid(self.box_head(features) + bias[None])
        objectness = None
        if self.config.model_type == "owlv2":
            objectness = self.objectness_head(jax.lax.stop_gradient(features))[..., 0]
        return Detections(boxes, self.class_head(features, queries), objectness)

    def __call__(
        self, input_ids: Int[Array, "q l"], pixel_values: Float[Array, "b h w 3"]
    ) -> Detections:
        """Looks for the same queries in every image."""
        queries = self.embed_queries(input_ids)
        return self.detect(
            pixel_values, jnp.broadcast_to(queries[None], (len(pixel_values), *queries.shape))
        )


def _box_bias(edge: int) -> Float[np.ndarray, "p 4"]:
    """The logits of a box of one patch's size at each patch of a square grid, row by row.

    The network adds its own to them, so that an untrained one proposes the patches themselves. The
    centre is the corner of the patch furthest from the origin, which is how the weights learnt it.
    """
    steps = np.arange(1, edge + 1) / edge
    y, x = np.meshgrid(steps, steps, indexing="ij")
    size = np.full_like(x, 1 / edge)
    boxes = np.stack([x, y, size, size], axis=-1).reshape(-1, 4)
    return (np.log(boxes + 1e-4) - np.log1p(1e-4 - boxes)).astype(np.float32)

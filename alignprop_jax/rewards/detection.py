"""Finding what a text names in images, differentiably: what rewards on objects share."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from alignprop_jax.loading.pretrained import load_component, resolve_network
from alignprop_jax.loading.shapes_only import compute
from alignprop_jax.loading.tokenizer import load_tokenizer, tokenize
from alignprop_jax.loading.weights import ParamTree
from alignprop_jax.models.owlvit import OwlViT
from alignprop_jax.rewards.preprocess import OwlPreprocessor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Boxes a query that are looked at, and how far two may overlap before they are one object.
_MAX_BOXES = 64
_MAX_OVERLAP = 0.5


@dataclasses.dataclass(frozen=True)
class Detector:
    """An open-vocabulary detector whose text tower has its work behind it.

    Attributes:
        params: what `find` needs; an argument of it, so that no program holds them as constants.
    """

    model: OwlViT
    params: ParamTree
    _text_params: ParamTree
    _tokenizer: "PreTrainedTokenizerBase"
    _preprocess: OwlPreprocessor

    def embed(self, names: Sequence[str]) -> Float[np.ndarray, "q e"]:
        """The queries that look for what `names` name."""

        def embed(params, ids):
            return self.model.apply({"params": params}, ids, method="embed_queries")

        ids = tokenize(self._tokenizer, list(names))
        return np.asarray(compute(embed, self._text_params, ids))

    def find(
        self, params: ParamTree, images: Float[Array, "b h w 3"], queries: Float[Array, "b q e"]
    ) -> Float[Array, "b q k"]:
        """Logits of the objects found by each image's own queries, the likeliest first.

        Of boxes that overlap by half, the likeliest stands for all; the others, as the places
        without a box, have -inf. Gradient reaches the image through the logits alone.
        """
        found = self.model.apply(
            {"params": params}, self._preprocess(images), queries, method="detect"
        )
        logits = found.logits.swapaxes(1, 2)
        best, patches = jax.lax.top_k(logits, min(_MAX_BOXES, logits.shape[-1]))
        boxes = jax.lax.stop_gradient(found.boxes)
        boxes = jax.vmap(lambda boxes, patches: boxes[patches])(boxes, patches)
        keep = jax.vmap(jax.vmap(_suppress_overlapping))(boxes)
        return jnp.where(keep, best, -jnp.inf)


def load_detector(detector: str, dtype: jnp.dtype = jnp.float32) -> Detector:
    """Loads an OWL-ViT or OWLv2 in transformers' layout, with its tokenizer.

    Args:
        detector: folder or hub id, such as google/owlvit-base-patch32, or "emoji".
        dtype: of the weights and activations.

    Raises:
        UserError: a file is missing, not supported or damaged.
    """
    folder = resolve_network(detector, "detector")
    model, params = load_component(OwlViT, folder, dtype)
    preprocess = OwlPreprocessor.from_folder(
        folder, model.config.vision.image_size, pads=model.config.model_type == "owlv2"
    )
    towers = params[model.config.model_type]
    text = {name: towers[name] for name in ("text_model", "text_projection", "logit_scale")}
    image = {name: towers[name] for name in ("vision_model", "logit_scale")}
    return Detector(
        model,
        {**params, model.config.model_type: image},
        {model.config.model_type: jax.device_get(text)},
        load_tokenizer(folder, model.config.text),
        preprocess,
    )


def _suppress_overlapping(boxes: Float[Array, "k 4"]) -> Bool[Array, " k"]:
    """Which boxes stay when each, in order, drops all later ones that overlap it too far.

    Args:
        boxes: centre x and y, width and height.
    """
    half = boxes[:, 2:] / 2
    low, high = boxes[:, :2] - half, boxes[:, :2] + half
    common = jnp.minimum(high[:, None], high[None]) - jnp.maximum(low[:, None], low[None])
    intersection = jnp.maximum(common, 0).prod(-1)
    area = boxes[:, 2] * boxes[:, 3]
    union = area[:, None] + area[None] - intersection
    overlaps = intersection > _MAX_OVERLAP * union
    later = jnp.arange(len(boxes))[None] > jnp.arange(len(boxes))[:, None]

    def visit(index, keep):
        return keep & ~(keep[index] & overlaps[index] & later[index])

    return jax.lax.fori_loop(0, len(boxes), visit, jnp.ones(len(boxes), bool))

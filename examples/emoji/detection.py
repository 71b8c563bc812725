"""Training the detector: where in a scene every object is, and which of all names it bears."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignprop_jax.loading.tokenizer import tokenize
from alignprop_jax.loading.weights import ParamTree
from alignprop_jax.nn.owlvit import OwlViT
from alignprop_jax.prompts.english import is_countable, plural
from examples.emoji.fit import BatchFn, LossFn
from examples.emoji.pixels import to_pixel_values
from examples.emoji.scenes import IMAGE_SIZE, Scene, SceneSampler

MAX_OBJECTS = 4
_NOWHERE = -1
# Of the focal loss (Lin et al., arXiv 1708.02002) and between the parts, as OWL-ViT's.
_ALPHA, _GAMMA, _BOX_WEIGHT = 0.25, 2.0, 5.0


def start_from_clip(params: ParamTree, clip: ParamTree) -> ParamTree:
    """Puts the towers of a CLIP into a fresh detector, and has it find next to nothing at first."""
    head = params["class_head"]
    vision = dict(clip["vision_model"])
    # The two differ in the spelling of one name.
    vision["pre_layernorm"] = vision.pop("pre_layrnorm")
    return {
        **params,
        "owlvit": {**params["owlvit"], **clip, "vision_model": vision},
        "class_head": {
            **head,
            "logit_scale": {**head["logit_scale"], "bias": jnp.array([4.0])},
            "logit_shift": {**head["logit_shift"], "bias": jnp.array([-1.0])},
        },
    }


def query_texts(names: Sequence[str]) -> list[str]:
    """What a prompt may call an object: every name, then the plural of every name that has one."""
    return [*names, *(plural(name) if is_countable(name) else name for name in names)]


def embed_texts(
    model: OwlViT, params: ParamTree, tokenizer, texts: Sequence[str]
) -> Float[Array, "q e"]:
    """Query embeddings of texts."""
    ids = tokenize(tokenizer, list(texts))
    return jax.jit(lambda p, x: model.apply({"params": p}, x, method="embed_queries"))(params, ids)


def make_detection_loss(
    model: OwlViT, frozen: ParamTree, queries: Float[Array, "q e"], noise: float
) -> LossFn:
    """Focal loss of every patch and name, and L1 of the boxes, an object.

    An object belongs to the one patch whose untrained box has the nearest centre; as in OWL-ViT,
    every other patch is to stay silent, so that each object is found once.

    Args:
        frozen: the parameters of `owlvit` that are not trained.
        queries: of N names, then of their N plurals.
        noise: standard deviation of what is added to pixel values in [-1, 1].
    """
    num_names = len(queries) // 2
    edge = model.config.vision.image_size // model.config.vision.patch_size

    def loss_fn(params, batch, key):
        images, boxes, names = batch
        noise_key, form_key = jax.random.split(key)
        pixel_values = to_pixel_values(images)
        pixel_values += noise * jax.random.normal(noise_key, pixel_values.shape)
        plural_form = jax.random.bernoulli(form_key, 0.5)
        table = jnp.where(plural_form, queries[num_names:], queries[:num_names])
        table = jnp.broadcast_to(table[None], (len(images), *table.shape))
        variables = {**params, "owlvit": {**frozen, **params["owlvit"]}}
        found = model.apply({"params": variables}, pixel_values, table, method="detect")

        column, row = (
            jnp.clip(jnp.round(boxes[..., axis] * edge).astype(int) - 1, 0, edge - 1)
            for axis in (0, 1)
        )
        exists = names != _NOWHERE
        # What does not exist falls off the end, where writing has no effect.
        patch = jnp.where(exists, row * edge + column, edge**2)
        image = jnp.arange(len(images))[:, None]
        targets = jnp.zeros_like(found.logits).at[image, patch, names].set(1.0, mode="drop")
        number = exists.sum()
        focal = _focal_loss(found.logits, targets).sum() / number
        at_objects = found.boxes[image, jnp.minimum(patch, edge**2 - 1)]
        distance = jnp.abs(at_objects - boxes).sum(-1)
        box = (distance * exists).sum() / number
        counted = (jax.nn.sigmoid(found.logits).max(-1) > 0.3).sum(-1)
        right = (counted == exists.sum(-1)).mean()
        return focal + _BOX_WEIGHT * box, {"focal": focal, "box": box, "count_right": right}

    return loss_fn


def _focal_loss(logits: Float[Array, "..."], targets: Float[Array, "..."]) -> Float[Array, "..."]:
    """-alpha (1 - p)^gamma log p, with p the probability of what is true."""
    sign = 2 * targets - 1
    log_p = jax.nn.log_sigmoid(sign * logits)
    alpha = jnp.where(targets == 1, _ALPHA, 1 - _ALPHA)
    return -alpha * jax.nn.sigmoid(-sign * logits) ** _GAMMA * log_p


def make_detection_batches(scenes: SceneSampler, names: Sequence[str], batch_size: int) -> BatchFn:
    """Batches of scenes with the box and the name of every object in them.

    Images uint8 [B, 64, 64, 3]; boxes float32 [B, 4, 4], centre x and y, width and height, as
    shares of the edge; names int32 [B, 4], -1 where there are no more objects.
    """
    index = {name: number for number, name in enumerate(names)}

    def batch_fn(rng: np.random.Generator):
        drawn = [scenes.scene(rng) for _ in range(batch_size)]
        boxes, labels = zip(*(_objects(scene, index) for scene in drawn), strict=True)
        return np.stack([scene.image for scene in drawn]), np.stack(boxes), np.stack(labels)

    return batch_fn


def _objects(scene: Scene, index: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    boxes = np.zeros((MAX_OBJECTS, 4), np.float32)
    labels = np.full(MAX_OBJECTS, _NOWHERE, np.int32)
    factors = scene.factors
    number = len(factors["boxes"])
    for slot, (left, top, edge) in enumerate(factors["boxes"]):
        boxes[slot] = (left + edge / 2, top + edge / 2, edge, edge)
        labels[slot] = index[factors["names"][slot * len(factors["names"]) // number]]
    return boxes / IMAGE_SIZE, labels

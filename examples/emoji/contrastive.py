"""Training CLIP: matching scenes with their captions (Radford et al., 2021, figure 3)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignprop_jax.loading.pretrained import initial_params
from alignprop_jax.loading.tokenizer import tokenize
from alignprop_jax.loading.weights import ParamTree
from alignprop_jax.nn.clip import CLIPConfig, CLIPModel
from examples.emoji.degrade import degrade
from examples.emoji.fit import BatchFn, LossFn, Recipe, fit
from examples.emoji.pixels import to_pixel_values
from examples.emoji.scenes import SceneSampler


def train_clip_model(
    name: str,
    config: Mapping[str, Any],
    recipe: Recipe,
    batches: BatchFn,
    workdir: Path,
    seed: int,
) -> ParamTree:
    """Trains both towers of a CLIP from scratch.

    Args:
        name: of its checkpoints in `workdir`.
        config: the content of its config.json.

    Returns:
        Its parameters.
    """
    model = CLIPModel(CLIPConfig.from_dict(config))
    start = initial_params(model, seed)
    return fit(name, recipe, make_contrastive_loss(model), batches, start, workdir, seed)


def make_contrastive_loss(model: CLIPModel, frozen: ParamTree | None = None) -> LossFn:
    """Symmetric cross-entropy between images and captions; equal captions share the target.

    Args:
        frozen: the parameters that are not trained, such as the text tower's (Zhai et al., arXiv
            2111.07991).
    """

    def loss_fn(params, batch, key):
        images, input_ids = batch
        pixel_values = to_pixel_values(images)
        # Sampled pictures are never as clean as drawn ones.
        pixel_values += 0.06 * jax.random.normal(key, pixel_values.shape)
        logits = model.apply({"params": {**(frozen or {}), **params}}, input_ids, pixel_values)
        same = (input_ids[:, None] == input_ids[None, :]).all(-1).astype(jnp.float32)
        targets = same / same.sum(-1, keepdims=True)
        loss = (
            -0.5
            * (
                (targets * jax.nn.log_softmax(logits, axis=-1)).sum(-1)
                + (targets * jax.nn.log_softmax(logits.T, axis=-1)).sum(-1)
            ).mean()
        )
        found = jnp.take_along_axis(same, logits.argmax(-1)[:, None], axis=1)[:, 0]
        return loss, {"accuracy": found.mean()}

    return loss_fn


def make_caption_batches(
    scenes: SceneSampler,
    tokenizer,
    batch_size: int,
    style_share: float,
    degraded_share: float,
) -> BatchFn:
    """Batches of scenes and token ids: uint8 [B, 64, 64, 3] and int32 [B, L].

    The captions of `style_share` of the scenes tell the style ("a glossy cat", "two flat dogs"),
    and `degraded_share` of the scenes are spoilt and say so ("a blurry cat"), so that the image
    embedding keeps what the plain captions would have it forget.
    """

    def batch_fn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        images, captions = [], []
        for _ in range(batch_size):
            scene = scenes.scene(rng)
            image, caption = scene.image, scene.caption
            draw = rng.random()
            if draw < degraded_share:
                image, word = degrade(rng, image)
                caption = _describe(caption, word)
            elif draw < degraded_share + style_share:
                caption = _describe(caption, scene.factors["style"])
            images.append(image)
            captions.append(caption)
        return np.stack(images), tokenize(tokenizer, captions)

    return batch_fn


def _describe(caption: str, adjective: str) -> str:
    """Puts an adjective after the first word: "an ant" -> "a blurry ant"."""
    first, rest = caption.split(" ", 1)
    return f"{'a' if first == 'an' else first} {adjective} {rest}"

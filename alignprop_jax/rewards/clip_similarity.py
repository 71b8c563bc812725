"""Agreement of an image with its prompt: the cosine of CLIP's embeddings of the two.

`clip_score` is the cosine itself (Hessel et al., arXiv 2104.08718, without their factor 2.5), for
any CLIP; `pickscore` multiplies it by the temperature of a CLIP tuned on people's choices (Kirstain
et al., arXiv 2305.01569).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignprop_jax.loading.pretrained import load_component, resolve_network
from alignprop_jax.loading.shapes_only import compute
from alignprop_jax.loading.tokenizer import load_tokenizer, tokenize
from alignprop_jax.loading.weights import ParamTree
from alignprop_jax.models.clip import CLIPModel
from alignprop_jax.rewards.base import Reward
from alignprop_jax.rewards.preprocess import CLIPPreprocessor
from alignprop_jax.rewards.registry import register

# What each tower needs, besides what only training does.
_IMAGE_PARAMS = ("vision_model", "visual_projection", "logit_scale")
_TEXT_PARAMS = ("text_model", "text_projection", "logit_scale")


@register("clip_score")
def make_clip_score_reward(clip: str = "emoji", dtype: jnp.dtype = jnp.float32) -> Reward:
    """The cosine, in [-1, 1].

    Args:
        clip: the folder or hub id of a transformers CLIPModel with its tokenizer, or "emoji".
        dtype: of CLIP's weights and activations.

    Raises:
        UserError: a file is missing, not supported or damaged.
    """
    return _load_similarity("clip_score", clip, dtype, lambda params: 1.0)


@register("pickscore")
def make_pickscore_reward(
    clip: str = "yuvalkirstain/PickScore_v1", dtype: jnp.dtype = jnp.float32
) -> Reward:
    """exp(logit_scale) times the cosine; of PickScore's own weights, mostly between 15 and 25.

    Arguments and errors as for `clip_score`.
    """
    return _load_similarity("pickscore", clip, dtype, lambda params: jnp.exp(params["logit_scale"]))


def image_params(params: ParamTree) -> ParamTree:
    """What `get_image_features` needs; the text tower is as large as the rest."""
    return {name: params[name] for name in _IMAGE_PARAMS}


def clip_similarity(
    name: str,
    model: CLIPModel,
    params: ParamTree,
    preprocess: CLIPPreprocessor,
    tokenize_prompts: Callable[[Sequence[str]], np.ndarray],
    scale: Callable[[ParamTree], Float[Array, ""] | float],
) -> Reward:
    """Makes the reward scale(params) cos(image, prompt) of a CLIP.

    Prompts are embedded when they are prepared, so that a training step runs the image tower alone;
    until then the text tower waits in the host's memory.

    Args:
        tokenize_prompts: prompts to token ids [P, L].
    """
    text_params = jax.device_get({key: params[key] for key in _TEXT_PARAMS})

    def prepare(prompts: Sequence[str]) -> Float[np.ndarray, "p d"]:
        def embed(params, ids):
            features = model.apply({"params": params}, ids, method="get_text_features")
            return _normalize(features)

        return np.asarray(compute(embed, text_params, tokenize_prompts(prompts)))

    def score(params, images, embedded_prompts):
        features = model.apply({"params": params}, preprocess(images), method="get_image_features")
        return scale(params) * (_normalize(features) * embedded_prompts).sum(-1)

    return Reward(name, image_params(params), score, prepare)


def _load_similarity(
    name: str,
    clip: str,
    dtype: jnp.dtype,
    scale: Callable[[ParamTree], Float[Array, ""] | float],
) -> Reward:
    folder = resolve_network(clip, "scene_clip")
    model, params = load_component(CLIPModel, folder, dtype)
    preprocess = CLIPPreprocessor.from_folder(folder, model.config.vision.image_size)
    tokenizer = load_tokenizer(folder, model.config.text)
    return clip_similarity(
        name, model, params, preprocess, lambda prompts: tokenize(tokenizer, list(prompts)), scale
    )


def _normalize(features: Float[Array, "b d"]) -> Float[Array, "b d"]:
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)

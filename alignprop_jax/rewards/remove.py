"""A concept is to vanish while the rest of the prompt stays, as a detector sees both."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignprop_jax.errors import UserError
from alignprop_jax.prompts.objects import prompt_objects
from alignprop_jax.rewards.base import Reward
from alignprop_jax.rewards.detection import Detector, load_detector
from alignprop_jax.rewards.registry import register


@register("remove")
def make_remove_reward(
    detector: str = "emoji", concept: str = "", dtype: jnp.dtype = jnp.float32
) -> Reward:
    """The mean score of what else the prompt names, minus the score of the concept, in [-1, 1].

    The score of a thing is its likeliest box's, as in VADER (Prabhudesai et al., arXiv 2407.08737).

    Args:
        detector: folder or hub id of an OWL-ViT or OWLv2 of transformers, or "emoji".
        concept: what is to vanish, such as "dog". Whatever has the word in its name is not kept.
        dtype: of the detector's weights and activations.

    Raises:
        UserError: there is no concept, or a file is missing or damaged.
    """
    if not concept.strip():
        raise UserError("reward 'remove' needs what is to vanish: give config.remove.concept=dog")
    loaded = load_detector(detector, dtype)

    def score(params, images, inputs):
        seen = presence(loaded.find(params, images, inputs["queries"]))
        return (inputs["weights"] * seen).sum(-1)

    return Reward(
        "remove", loaded.params, score, lambda prompts: _prepare(loaded, prompts, concept)
    )


def presence(logits: Float[Array, "b q k"]) -> Float[Array, "b q"]:
    """The score of the likeliest box, the first, of each query."""
    return jax.nn.sigmoid(logits[..., 0])


def kept_objects(prompt: str, concept: str) -> list[str]:
    """What a prompt names besides the concept."""
    return [
        thing.name for thing in prompt_objects(prompt) if concept.lower().strip() not in thing.name
    ]


def _prepare(detector: Detector, prompts: Sequence[str], concept: str) -> dict[str, np.ndarray]:
    kept = [kept_objects(prompt, concept) for prompt in prompts]
    names = sorted({concept, *(name for names in kept for name in names)})
    table = dict(zip(names, detector.embed(names), strict=True))
    width = 1 + max(map(len, kept))
    queries = np.repeat(table[concept][None, None], width, axis=1).repeat(len(prompts), axis=0)
    weights = np.zeros((len(prompts), width), np.float32)
    weights[:, 0] = -1
    for row, names in enumerate(kept):
        for slot, name in enumerate(names, start=1):
            queries[row, slot], weights[row, slot] = table[name], 1 / len(names)
    return {"queries": queries, "weights": weights}

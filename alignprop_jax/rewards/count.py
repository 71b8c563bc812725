"""As many objects as the prompt says, by the expected count of an open-vocabulary detector."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignprop_jax.errors import UserError
from alignprop_jax.prompts.objects import PromptObject, prompt_objects
from alignprop_jax.rewards.base import Reward
from alignprop_jax.rewards.detection import MAX_BOXES, Detector, load_detector
from alignprop_jax.rewards.registry import register

# How many logits about the threshold a box is half counted.
_TEMPERATURE = 0.5


@register("count")
def make_count_reward(
    detector: str = "emoji",
    threshold: float = 0.2,
    number: int = 0,
    dtype: jnp.dtype = jnp.float32,
) -> Reward:
    """Minus the distance of the expected count to the number, summed over what the prompt names.

    Args:
        detector: folder or hub id of an OWL-ViT or OWLv2 of transformers, or "emoji".
        threshold: score in (0, 1) at which a box counts half.
        number: of each object; 0: what the prompt says, "three dogs and a cat".
        dtype: of the detector's weights and activations.

    Raises:
        UserError: a file is missing or damaged; or, when it prepares, a prompt has no number, or
            one that is larger than can be counted.
    """
    loaded = load_detector(detector, dtype)

    def score(params, images, inputs):
        expected = expected_counts(loaded.find(params, images, inputs["queries"]), threshold)
        return -(inputs["exists"] * jnp.abs(expected - inputs["numbers"])).sum(-1)

    return Reward("count", loaded.params, score, lambda prompts: _prepare(loaded, prompts, number))


def expected_counts(logits: Float[Array, "b q k"], threshold: float) -> Float[Array, "b q"]:
    """How many of k boxes are objects: the sum of what each counts, 0 to 1, by its logit."""
    middle = math.log(threshold / (1 - threshold))
    return jax.nn.sigmoid((logits - middle) / _TEMPERATURE).sum(-1)


def _prepare(detector: Detector, prompts: Sequence[str], number: int) -> dict[str, np.ndarray]:
    wanted = [_numbered_objects(prompt, number) for prompt in prompts]
    names = sorted({thing.name for things in wanted for thing in things})
    table = dict(zip(names, detector.embed(names), strict=True))
    width = max(map(len, wanted))
    queries = np.zeros((len(prompts), width, len(table[names[0]])), np.float32)
    numbers = np.zeros((len(prompts), width), np.float32)
    exists = np.zeros((len(prompts), width), np.float32)
    for row, things in enumerate(wanted):
        # A query of zeros would have no direction: what does not exist looks for the first again.
        queries[row] = table[things[0].name]
        for slot, thing in enumerate(things):
            queries[row, slot] = table[thing.name]
            numbers[row, slot], exists[row, slot] = thing.number, 1
    return {"queries": queries, "numbers": numbers, "exists": exists}


def _numbered_objects(prompt: str, number: int) -> list[PromptObject]:
    things = [
        thing._replace(number=number or thing.number)
        for thing in prompt_objects(prompt)
        if number or thing.number is not None
    ]
    if not things:
        raise UserError(
            f"reward 'count': the prompt {prompt!r} does not say how many of what; write "
            "'three dogs', or give config.count.number"
        )
    for thing in things:
        if thing.number > MAX_BOXES:
            raise UserError(
                f"reward 'count': the prompt {prompt!r} asks for {thing.number} {thing.name}; at "
                f"most {MAX_BOXES} of a kind can be counted"
            )
    return things

"""The one shape every reward has."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, PyTree

from alignprop_jax.errors import UserError

# Images [B, H, W, 3] float32 in [0, 1] and their prompts in, scores [B] out.
Scorer = Callable[[np.ndarray, Sequence[str]], np.ndarray]
_SHOWN_CHARACTERS = 300

Score = Callable[[PyTree, Float[Array, "b h w 3"], PyTree], Float[Array, " b"]]


@dataclasses.dataclass(frozen=True)
class Reward:
    """A differentiable score of images.

    Attributes:
        name: what logs and messages call it.
        params: weights. They are an argument of `score`, so that a compiled step takes them as an
            argument too and does not hold them as constants.
        score: (params, images, prompt_inputs) -> scores. Images are [B, H, W, 3] float32 in
            [0, 1], scores [B] float32; traceable and differentiable in the images.
        prepare: turns P prompts into arrays with leading axis P, once before training. A step
            gathers its rows, [B, ...], as `prompt_inputs`.
        parts: for a sum of rewards, the score of each, unweighted, by name; as `score`, of the same
            arguments.
        add_up: for a sum of rewards, (params, scores of the parts by name) -> scores.
        weights: for a sum of rewards, that of each part, by name.
        source: where it is from, such as "path/to/file.py:function", for errors to say.
    """

    name: str
    params: PyTree
    score: Score
    prepare: Callable[[Sequence[str]], PyTree]
    parts: Mapping[str, Score] = dataclasses.field(default_factory=dict)
    add_up: Callable[[PyTree, Mapping[str, Array]], Float[Array, " b"]] | None = None
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    source: str = ""

    def score_with_parts(
        self, params: PyTree, images: Float[Array, "b h w 3"], inputs: PyTree
    ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
        """`score`, and that of each part of a sum by its name, of one evaluation of each."""
        if not self.parts:
            return self.score(params, images, inputs), {}
        scores = {name: score(params, images, inputs) for name, score in self.parts.items()}
        return self.add_up(params, scores), scores


def no_prompt_inputs(prompts: Sequence[str]) -> np.ndarray:
    """`Reward.prepare` of a reward that looks at the image alone: [P, 0]."""
    return np.zeros((len(prompts), 0), np.float32)


def check_reward(
    reward: Reward,
    image_shape: tuple[int, int, int],
    differentiable: bool = True,
    inputs: PyTree | None = None,
) -> None:
    """Traces the reward and its gradient without computing them.

    Args:
        image_shape: height, width and 3.
        differentiable: whether it has to have a gradient.
        inputs: what `reward.prepare` gave; None for that of made-up prompts.

    Raises:
        UserError: the reward fails, cannot be traced or differentiated, does not return one float
            an image, or has a gradient of 0 whatever the image, as a constant has.
    """
    batch = 3
    if inputs is None:
        inputs = reward.prepare(["a photo"])
    inputs = jax.tree.map(lambda rows: np.asarray(rows)[np.arange(batch) % len(rows)], inputs)
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    arguments = (reward.params, images, inputs)
    # Of a sum the parts: one of the wrong shape may go unseen in it.
    for name, score in (reward.parts or {reward.source or reward.name: reward.score}).items():
        _check_scores(name, score, arguments, batch)
        if differentiable:
            # A part of weight 0 is there to be watched.
            _check_gradient(name, score, arguments, may_be_0=reward.weights.get(name) == 0)


def _check_scores(name: str, score: Score, arguments: tuple, batch: int) -> None:
    try:
        scores = jax.eval_shape(score, *arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward {name!r} fails: {type(error).__name__}: {error}") from error
    shape = getattr(scores, "shape", None)
    if shape != (batch,):
        raise UserError(
            f"reward {name!r} must return one score an image, shape [{batch}] for {batch} "
            f"images, not {type(scores).__name__ if shape is None else list(shape)}"
        )
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise UserError(f"reward {name!r} must return floats, not {scores.dtype}")


def _check_gradient(name: str, score: Score, arguments: tuple, may_be_0: bool) -> None:
    depends = False

    # JAX tells the rule of such a function which of its inputs have a derivative of 0 by the way
    # that they are computed.
    @jax.custom_jvp
    def watch(scores):
        return scores

    @functools.partial(watch.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        nonlocal depends
        depends = depends or not isinstance(tangents[0], SymbolicZero)
        return primals[0], tangents[0]

    def total(params, images, inputs):
        return watch(score(params, images, inputs)).sum()

    cure = "write it in differentiable jax.numpy, or set config.algorithm to ddpo or rwr"
    try:
        jax.eval_shape(jax.grad(total, argnums=1), *arguments)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:_SHOWN_CHARACTERS]
        raise UserError(
            f"reward {name!r} has no gradient by the image, which this algorithm descends "
            f"({reason}); {cure}"
        ) from error
    if not depends and not may_be_0:
        raise UserError(
            f"reward {name!r} has a gradient of exactly 0 whatever the image, so it trains "
            "nothing: it is constant, or rounds, casts to integers, compares or stops the "
            f"gradient on the way; {cure}"
        )

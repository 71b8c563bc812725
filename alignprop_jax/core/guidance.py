"""How a prediction is guided by a prompt and away from a negative one."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped


class Guidance(Protocol):
    """What is done around an evaluation of the network. Whether it is on is asked once: here."""

    def pair(self, prompts: PyTree, negative: PyTree) -> PyTree:
        """What the network is told: n encoded prompts for b samples.

        Args:
            prompts: encoded, one a sample.
            negative: encoded negative prompts, one a sample or one for all.
        """

    def spread(self, per_sample: PyTree) -> PyTree:
        """An input of the network, of b samples, in the form that goes with `pair`."""

    def combine(self, predictions: PyTree) -> PyTree:
        """The guided predictions, b of n."""


@dataclasses.dataclass(frozen=True)
class Unguided:
    """The prediction as it is, at half the cost."""

    def pair(self, prompts: PyTree, negative: PyTree) -> PyTree:
        del negative
        return prompts

    def spread(self, per_sample: PyTree) -> PyTree:
        return per_sample

    def combine(self, predictions: PyTree) -> PyTree:
        return predictions


@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """u + w (c - u), of the prediction c with the prompt and u with the negative one.

    Ho & Salimans, arXiv 2207.12598.

    Attributes:
        scale: the weight w.
        shared: the network takes one state for both prompts, and evaluates once what they have in
            common. XLA rounds that differently from one batch to another, which importance weights
            would see.
    """

    scale: float
    shared: bool = True

    def pair(self, prompts: PyTree, negative: PyTree) -> PyTree:
        batch = jax.tree.leaves(prompts)[0].shape[0]
        return jax.tree.map(interleave, broadcast_to_batch(negative, batch), prompts)

    def spread(self, per_sample: PyTree) -> PyTree:
        if self.shared:
            return per_sample
        return jax.tree.map(lambda x: interleave(x, x) if jnp.ndim(x) else x, per_sample)

    def combine(self, predictions: PyTree) -> PyTree:
        def combine(output: Array) -> Array:
            negative, positive = output[0::2], output[1::2]
            return negative + self.scale * (positive - negative)

        return jax.tree.map(combine, predictions)


def classifier_free(scale: float, shared: bool = True) -> Guidance:
    """Classifier-free guidance of that scale; none at 1."""
    return Unguided() if scale == 1.0 else ClassifierFree(scale, shared)


def interleave(*batches: Shaped[Array, "b *s"]) -> Shaped[Array, "n*b *s"]:
    """Merges n batches, sample by sample, so that a batch split over devices stays where it is."""
    return jnp.stack(batches, axis=1).reshape(-1, *batches[0].shape[1:])


def broadcast_to_batch(tree: PyTree, batch: int) -> PyTree:
    """One row for each sample, from one a sample or one for all."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), tree)

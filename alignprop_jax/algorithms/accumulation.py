"""Gradients of batches that do not fit in memory at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def accumulate_gradients(
    objective: Callable[[PyTree, PyTree], tuple[Float[Array, ""], PyTree]],
    variables: PyTree,
    batch: PyTree,
    num_microbatches: int,
) -> tuple[Float[Array, ""], PyTree, PyTree]:
    """Value and gradient of a mean over the batch, one microbatch in memory at a time.

    Args:
        objective: `objective(variables, batch) -> (value, aux)`, where the value is a mean over the
            batch and aux holds arrays with the batch as their leading axis.
        variables: what to differentiate by.
        batch: arrays with a leading axis that `num_microbatches` divides.
        num_microbatches: how many to work through, one after the other.

    Returns:
        The value, aux and gradient that `objective` has on the whole batch.
    """
    value_and_grad = jax.value_and_grad(objective, has_aux=True)
    if num_microbatches == 1:
        (value, aux), gradient = value_and_grad(variables, batch)
        return value, aux, gradient

    def add(total, microbatch):
        (value, aux), gradient = value_and_grad(variables, microbatch)
        return jax.tree.map(jnp.add, total, (value, gradient)), aux

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, variables))
    total, aux = jax.lax.scan(add, zeros, split_into(num_microbatches, batch))
    value, gradient = jax.tree.map(lambda x: x / num_microbatches, total)
    return value, _merge(aux), gradient


def map_microbatches(
    function: Callable[[PyTree], PyTree], batch: PyTree, num_microbatches: int
) -> PyTree:
    """Returns `function(batch)`, computed for one microbatch after the other.

    Args:
        function: from arrays with the batch as their leading axis to such arrays.
        batch: arrays with a leading axis that `num_microbatches` divides.
    """
    if num_microbatches == 1:
        return function(batch)
    return _merge(jax.lax.map(function, split_into(num_microbatches, batch)))


def split_into(number: int, batch: PyTree) -> PyTree:
    """Splits the leading axis of arrays, [n*b, ...] to [n, b, ...].

    A part is every n-th row, so that it is spread over devices as the batch is.
    """
    return jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), batch)


def _merge(parts: PyTree) -> PyTree:
    """The inverse of `split_into`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)

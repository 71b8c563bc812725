"""Evaluations whose gradient, and whose evaluation itself, is decided at run time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from alignprop_jax.nn import saved_names

REMAT_POLICIES = ("none", "partial", "step", "block")
KEEPS_ARGUMENTS_ALONE = ("step", "block")
_COSTLY = jax.checkpoint_policies.save_only_these_names(*saved_names.ALL)


def gate_gradient(predict: Callable[..., PyTree], remat: str) -> Callable[..., PyTree]:
    """Makes the passes of one evaluation optional, decided at run time.

    The forward pass is `predict` whatever the gate. The backward pass is a branch: with an open
    gate it differentiates `predict`, with a closed gate it returns zeros and evaluates nothing. So
    in a scan over steps the cost falls with every closed gate, one compiled program serves every
    choice of them, and the gradient of a closed evaluation is zero exactly.

    Args:
        predict: `predict(adapter, state, constants) -> prediction`.
        remat: what is kept for the backward pass: "none" keeps every activation; "partial" what
            convolutions and attention gave, from which the rest is computed again; "step" and
            "block" the arguments alone, with which all of `predict` is evaluated again.

    Returns:
        `gated(gate, adapter, state, constants, runs=None)`, differentiable in `adapter` and in what
        is of floats in `state`. The constants have no gradient, and therefore cost none. With
        `runs` the forward pass is a branch too, which evaluates nothing and gives zeros where it is
        False; the gate must be closed there. What may not be evaluated cannot be kept, so that only
        arguments are then.
    """

    @jax.custom_vjp
    def gated(gate, adapter, state, constants, runs=None):
        del gate
        if runs is None:
            return predict(adapter, state, constants)
        shapes = jax.eval_shape(predict, adapter, state, constants)

        def nothing(adapter, state, constants):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        # The branch is in here, where no gradient is taken of it: that of a cond copies the weights
        # at every step, to keep them for its backward pass.
        return jax.lax.cond(runs, predict, nothing, adapter, state, constants)

    def forward(gate, adapter, state, constants, runs):
        if remat in KEEPS_ARGUMENTS_ALONE or runs is not None:
            prediction = gated(gate, adapter, state, constants, runs)
            return prediction, (gate, adapter, state, constants, None)

        def evaluate(adapter, state):
            return predict(adapter, state, constants)

        if remat == "partial":
            evaluate = jax.checkpoint(evaluate, policy=_COSTLY, prevent_cse=False)
        prediction, vjp = jax.vjp(evaluate, adapter, state)
        return prediction, (gate, adapter, state, None, vjp)

    def backward(residuals, cotangent):
        gate, adapter, state, constants, vjp = residuals

        def differentiate():
            if vjp is not None:
                return _floats(vjp(cotangent))
            _, again = jax.vjp(lambda adapter, state: predict(adapter, state, constants), *inputs)
            return _floats(again(cotangent))

        inputs = (adapter, state)
        zeros = jax.tree.map(jnp.zeros_like, _floats(inputs))
        cotangents = jax.lax.cond(gate, differentiate, lambda: zeros)
        adapter_cotangent, state_cotangent = _with_the_rest(inputs, cotangents)
        return None, adapter_cotangent, state_cotangent, None, None

    gated.defvjp(forward, backward)
    return gated


# Integers, such as tokens of a state, have no gradient. A branch cannot return the empty type that
# JAX gives them for one, so it returns the gradients of floats alone.


def _floats(tree: PyTree) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _with_the_rest(like: PyTree, floats: list[Any]) -> PyTree:
    remaining = iter(floats)

    def cotangent(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return next(remaining)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(cotangent, like)

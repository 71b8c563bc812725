"""The optimizer of the LoRA factors."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree


def make_optimizer(
    learning_rate: float,
    weight_decay: float = 1e-4,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after clipping the gradient's global norm to `max_grad_norm`."""
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(learning_rate, beta1, beta2, epsilon, weight_decay=weight_decay),
    )


def descend_if(
    finite: Bool[Array, ""],
    optimizer: optax.GradientTransformation,
    gradient: PyTree,
    lora: PyTree,
    opt_state: PyTree,
) -> tuple[PyTree, PyTree]:
    """One update, left out where the gradient is not finite; returns factors and moments."""
    updates, new_opt_state = optimizer.update(gradient, opt_state, lora)
    new_lora = optax.apply_updates(lora, updates)
    return jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (new_lora, new_opt_state),
        (lora, opt_state),
    )

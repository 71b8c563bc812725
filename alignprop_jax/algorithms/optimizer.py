"""The optimizer of the LoRA factors."""

import optax


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

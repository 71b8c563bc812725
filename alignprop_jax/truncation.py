"""Truncated backpropagation through time: which denoising steps the reward's gradient may enter."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from alignprop_jax.errors import UserError

STRATEGIES = ("full", "fixed", "uniform", "gaussian", "per_step")


def check_truncation(
    strategy: str,
    num_steps: int,
    *,
    start: int = 0,
    mean: float = 0.0,
    std: float = 1.0,
    low: int = 0,
    high: int = 0,
) -> None:
    """Raises UserError unless `draw_trained_steps` can follow these settings.

    A strategy reads its own settings only; the others may hold anything.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"truncation.strategy is {strategy!r}; supported: {', '.join(STRATEGIES)}")
    if strategy == "fixed" and not 0 <= start <= num_steps:
        raise UserError(
            f"truncation.start is {start}; with {num_steps} sampler steps it must lie between 0 "
            f"and {num_steps}"
        )
    if strategy in ("uniform", "per_step") and not 0 <= low <= high <= num_steps:
        raise UserError(
            f"truncation.min is {low} and truncation.max is {high}; with {num_steps} sampler steps "
            f"they must be in order and lie between 0 and {num_steps}"
        )
    if strategy == "gaussian":
        if num_steps < 2:
            raise UserError("truncation.strategy 'gaussian' needs at least 2 sampler steps")
        if not std > 0:
            raise UserError(f"truncation.std is {std}; it must be positive")
        if not 1 <= mean < num_steps:
            raise UserError(
                f"truncation.mean is {mean}; with {num_steps} sampler steps it must be at least 1 "
                f"and below {num_steps}"
            )


def draw_trained_steps(
    key: Key[Array, ""],
    strategy: str,
    num_steps: int,
    *,
    start: int = 0,
    mean: float = 0.0,
    std: float = 1.0,
    low: int = 0,
    high: int = 0,
) -> Bool[Array, " t"]:
    """Draws which of the T sampler steps are trained, step 0 being the noisiest.

    Where the value is False, the denoiser's output is a constant to the gradient. AlignProp
    (arXiv 2310.03739) trains a suffix of random length; its releases differ in how they draw it.

    Args:
        key: the source of randomness, used up.
        strategy: one of
            "full", every step;
            "fixed", the steps from `start` on;
            "uniform", the steps from a cut-off on that is uniform over `low` to `high` inclusive (a
            cut-off of T trains nothing);
            "gaussian", the same with the floor of a normal variable of `mean` and `std` that is
            truncated to [1, T), so that at least the last step is trained;
            "per_step", a fresh uniform cut-off at every step, which scatters the trained steps and
            makes late ones more likely.
        num_steps: T.
        start: see "fixed".
        mean: see "gaussian".
        std: see "gaussian".
        low: see "uniform" and "per_step".
        high: see "uniform" and "per_step".
    """
    steps = jnp.arange(num_steps)
    if strategy == "full":
        return jnp.ones(num_steps, bool)
    if strategy == "fixed":
        return steps >= start
    if strategy == "uniform":
        return steps >= jax.random.randint(key, (), low, high + 1)
    if strategy == "gaussian":
        lower, upper = (1 - mean) / std, (num_steps - mean) / std
        draw = mean + std * jax.random.truncated_normal(key, lower, upper)
        # Rounding in float32 may reach the open end of the interval.
        cutoff = jnp.clip(jnp.floor(draw), 1, num_steps - 1)
        return steps >= cutoff.astype(steps.dtype)
    return steps >= jax.random.randint(key, (num_steps,), low, high + 1)


def first_trained_step(trained: Bool[Array, " t"]) -> Int[Array, ""]:
    """Index of the first trained step; T when nothing is trained."""
    return jnp.where(jnp.any(trained), jnp.argmax(trained), trained.shape[0])

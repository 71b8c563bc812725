"""Several rewards as one: each standardised, weighted and added.

A part counts by how far it is from what the untrained model earns, in standard deviations of that:
so a weight means the same for a cosine near 0.3 as for a size of 50 kB.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from alignprop_jax.errors import UserError
from alignprop_jax.rewards.base import Reward, Score

# By part: mean and standard deviation of its raw score.
Statistics = Mapping[str, tuple[float, float]]


def weighted_sum(rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> Reward:
    """Makes sum w (r - mean) / std; until `standardize` says otherwise, of mean 0 and std 1.

    Raises:
        UserError: there is no part with a weight, or a weight is no number.
    """
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"the weight of reward {name!r} must be a number, not {weight!r}")
        if not math.isfinite(weight):
            raise UserError(f"the weight of reward {name!r} must be finite, not {weight}")
    if not any(weights.values()):
        raise UserError("a sum of rewards needs one at least, of weight not 0: {name: weight}")

    def part(name: str) -> Score:
        reward = rewards[name]
        return lambda params, images, inputs: reward.score(
            params["parts"][name], images, inputs[name]
        )

    parts = {name: part(name) for name in rewards}

    def add_up(params, scores):
        total = jnp.float32(0)
        for name, values in scores.items():
            mean, std = params["statistics"][name]
            total += weights[name] * (values - mean) / std
        return total

    def score(params, images, inputs):
        return add_up(params, {name: part(params, images, inputs) for name, part in parts.items()})

    reward = Reward(
        name=" + ".join(f"{weight:g} {name}" for name, weight in weights.items()),
        params={"parts": {name: reward.params for name, reward in rewards.items()}},
        score=score,
        prepare=lambda prompts: {name: reward.prepare(prompts) for name, reward in rewards.items()},
        parts=parts,
        add_up=add_up,
        weights=weights,
    )
    return standardize(reward, dict.fromkeys(rewards, (0.0, 1.0)))


def standardize(reward: Reward, statistics: Statistics) -> Reward:
    """A sum of rewards whose parts have the mean and the standard deviation given.

    They are parameters as weights are: a compiled step serves whatever they turn out to be.
    """
    arrays = {
        name: (jnp.float32(mean), jnp.float32(std)) for name, (mean, std) in statistics.items()
    }
    return dataclasses.replace(reward, params={**reward.params, "statistics": arrays})


def measure(scores: Mapping[str, Float[np.ndarray, " n"]]) -> Statistics:
    """The statistics of raw scores; what never changes is left on its own scale.

    Raises:
        UserError: a score is not finite, so that it has no scale.
    """
    statistics = {}
    for name, values in scores.items():
        if not np.isfinite(values).all():
            number = np.count_nonzero(~np.isfinite(values))
            raise UserError(
                f"reward {name!r} is NaN or infinite for {number} of {len(values)} samples of the "
                "untrained model, so it has no scale to be added to others by; check the reward"
            )
        std = float(values.std())
        statistics[name] = (float(values.mean()), std if std > 1e-6 else 1.0)
    return statistics

"""How sure a mean over samples is, by the bootstrap (Efron & Tibshirani, 1993, section 13.3)."""

import numpy as np
from jaxtyping import Float, Int

_NUM_RESAMPLES = 4000


def confidence_interval(
    scores: Float[np.ndarray, " n"], prompts: Int[np.ndarray, " n"], level: float = 0.95
) -> tuple[float, float] | None:
    """The percentile interval of the mean of `scores`.

    Prompts are what is resampled, each with all its samples: those of one prompt are alike, and
    another user brings other prompts.

    Args:
        scores: one a sample, finite.
        prompts: which prompt each is of.
        level: how often such intervals hold the mean over all prompts there could be.

    Returns:
        Lower and upper end; None for fewer than two prompts, which tell nothing of others. The same
        scores give the same interval.
    """
    numbers, prompts = np.unique(prompts, return_inverse=True)
    if len(numbers) < 2:
        return None
    sums = np.bincount(prompts, np.asarray(scores, np.float64))
    counts = np.bincount(prompts)
    drawn = np.random.default_rng(0).integers(len(sums), size=(_NUM_RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)

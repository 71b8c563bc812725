"""Confidence intervals against SciPy's bootstrap and the normal distribution."""

import numpy as np
import scipy.stats

from alignprop_jax.evaluation.bootstrap import confidence_interval


def test_one_sample_a_prompt_is_the_plain_bootstrap():
    scores = np.random.default_rng(3).exponential(size=60).astype(np.float32)
    peer = scipy.stats.bootstrap(
        (scores,), np.mean, n_resamples=20_000, method="percentile", random_state=1
    ).confidence_interval
    found = confidence_interval(scores, np.arange(60))
    np.testing.assert_allclose(found, (peer.low, peer.high), rtol=0.02)
    assert found == confidence_interval(scores, np.arange(60))


def test_samples_of_a_prompt_are_no_samples_of_prompts():
    """Each of 50 prompts has a mean of its own, and 20 samples that hardly differ from it."""
    rng = np.random.default_rng(4)
    means = rng.standard_normal(50)
    prompts = np.tile(np.arange(50), 20)
    scores = means[prompts] + 0.01 * rng.standard_normal(1000)
    low, high = confidence_interval(scores, prompts)
    half = 1.96 * means.std() / np.sqrt(50)
    np.testing.assert_allclose((low, high), (means.mean() - half, means.mean() + half), atol=0.03)


def test_prompts_count_by_their_samples():
    """A judge may have an opinion on some samples alone."""
    low, high = confidence_interval(np.array([0.0] * 9 + [1.0]), np.array([0] * 9 + [1]))
    assert (low, high) == (0.0, 1.0)
    low, high = confidence_interval(np.array([0.3, 0.3, 0.3]), np.array([5, 5, 7]))
    np.testing.assert_allclose((low, high), 0.3)


def test_one_prompt_has_no_interval():
    assert confidence_interval(np.array([0.1, 0.9]), np.array([2, 2])) is None
    assert confidence_interval(np.array([]), np.array([], int)) is None

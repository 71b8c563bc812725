"""Which steps each truncation strategy trains, by the definition of its distribution."""

import math

import jax
import numpy as np
import pytest

from alignprop_jax.core.truncation import first_trained_step, make_truncation
from alignprop_jax.errors import UserError

DRAWS = 4000


def draw_many(strategy, num_steps, **settings):
    @jax.jit
    @jax.vmap
    def draw(key):
        return make_truncation(strategy, **settings).draw(key, num_steps)

    trained = np.asarray(draw(jax.random.split(jax.random.key(0), DRAWS)))
    assert trained.shape == (DRAWS, num_steps)
    assert trained.dtype == bool
    return trained


def cutoffs(trained):
    """First trained step of each draw, which must train everything after it too."""
    starts = trained.shape[1] - trained.sum(axis=1)
    np.testing.assert_array_equal(trained, np.arange(trained.shape[1]) >= starts[:, None])
    return starts


def assert_frequencies(samples, probabilities):
    """Each value's frequency lies within five standard errors of its probability."""
    assert set(np.unique(samples)) <= set(probabilities)
    for value, probability in probabilities.items():
        error = math.sqrt(probability * (1 - probability) / DRAWS)
        assert abs(np.mean(samples == value) - probability) <= 5 * error, value


def test_full_trains_everything():
    assert draw_many("full", 6).all()


@pytest.mark.parametrize("start", [0, 4, 6])
def test_fixed_trains_from_start(start):
    assert (cutoffs(draw_many("fixed", 6, start=start)) == start).all()


def test_uniform_includes_both_ends():
    starts = cutoffs(draw_many("uniform", 6, min=2, max=6))
    assert_frequencies(starts, dict.fromkeys(range(2, 7), 1 / 5))


@pytest.mark.parametrize(("num_steps", "mean", "std"), [(10, 7.0, 2.0), (10, 8.5, 5.0)])
def test_gaussian_is_the_floor_of_a_truncated_normal(num_steps, mean, std):
    def cdf(x):
        return 0.5 * (1 + math.erf((x - mean) / (std * math.sqrt(2))))

    starts = cutoffs(draw_many("gaussian", num_steps, mean=mean, std=std))
    mass = cdf(num_steps) - cdf(1)
    assert_frequencies(starts, {k: (cdf(k + 1) - cdf(k)) / mass for k in range(1, num_steps)})


def test_per_step_draws_each_step_anew():
    num_steps = 6
    trained = draw_many("per_step", num_steps, min=0, max=num_steps)
    # Step i is trained when a cut-off in 0..T is at most i: (i + 1) / (T + 1).
    for i in range(num_steps):
        assert_frequencies(
            trained[:, i], {True: (i + 1) / (num_steps + 1), False: 1 - (i + 1) / (num_steps + 1)}
        )
    # Independent steps scatter: here an untrained step after a trained one is common.
    assert np.mean((trained[:, :-1] & ~trained[:, 1:]).any(axis=1)) > 0.3
    correlations = np.corrcoef(trained.T) - np.eye(num_steps)
    assert np.abs(correlations).max() < 5 / math.sqrt(DRAWS)


@pytest.mark.parametrize("k", [1, 4, 6])
def test_last_trains_k_steps_up_to_the_last_that_is_run(k):
    assert (cutoffs(draw_many("last", 6, k=k)) == 6 - k).all()
    trained = make_truncation("last", k=2).draw(jax.random.key(0), 6, stop=3)
    np.testing.assert_array_equal(np.flatnonzero(trained[:4]), [2, 3])


@pytest.mark.parametrize(
    ("num_steps", "k", "stride", "phases"),
    [(10, 5, 2, 2), (10, 3, 3, 4), (10, 1, 10, 10), (5, 5, 1, 1)],
)
def test_spaced_trains_k_steps_at_a_random_phase(num_steps, k, stride, phases):
    trained = draw_many("spaced", num_steps, k=k)
    first = trained.argmax(axis=1)
    assert_frequencies(first, dict.fromkeys(range(phases), 1 / phases))
    for row, phase in zip(trained[:200], first[:200], strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row), phase + stride * np.arange(k))


EACH_STRATEGY = pytest.mark.parametrize(
    "strategy, settings",
    [
        ("full", {}),
        ("fixed", {"start": 4}),
        ("uniform", {"min": 2, "max": 10}),
        ("gaussian", {"mean": 7.0, "std": 2.0}),
        ("gaussian", {"mean": 2.0, "std": 5.0}),
        ("per_step", {"min": 0, "max": 10}),
        ("last", {"k": 3}),
        ("spaced", {"k": 3}),
    ],
)


@EACH_STRATEGY
def test_expected_steps_are_the_mean_of_the_draws(strategy, settings):
    counts = draw_many(strategy, 10, **settings).sum(1)
    error = counts.std() / math.sqrt(DRAWS)
    expected = make_truncation(strategy, **settings).expected_steps(10)
    assert abs(counts.mean() - expected) <= 5 * error + 1e-9


@EACH_STRATEGY
def test_steps_that_are_never_trained_are_all_before_the_first_that_ever_is(strategy, settings):
    ever = draw_many(strategy, 10, **settings).any(0)
    assert make_truncation(strategy, **settings).never_trained(10) == np.argmax(ever)


@pytest.mark.parametrize(
    ("trained", "first"),
    [([1, 1, 1], 0), ([0, 0, 1], 2), ([0, 1, 0], 1), ([0, 0, 0], 3)],
)
def test_first_trained_step(trained, first):
    assert first_trained_step(np.asarray(trained, bool)) == first


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"strategy": "sometimes"}, "strategy is 'sometimes'"),
        ({"strategy": "fixed", "start": 21}, "start is 21"),
        ({"strategy": "fixed", "start": -1}, "start is -1"),
        ({"strategy": "uniform", "min": 0, "max": 21}, "max is 21"),
        ({"strategy": "per_step", "min": 5, "max": 4}, "min is 5"),
        ({"strategy": "last", "k": 0}, "k is 0"),
        ({"strategy": "spaced", "k": 21}, "k is 21"),
        ({"strategy": "gaussian", "mean": 42.0}, "mean is 42.0"),
        ({"strategy": "gaussian", "mean": 5.0, "std": 0.0}, "std is 0.0"),
    ],
)
def test_refuses_settings_that_do_not_fit_the_sampler(settings, culprit):
    with pytest.raises(UserError, match=culprit):
        make_truncation(**settings).check(20)


def test_gaussian_needs_a_step_to_cut():
    with pytest.raises(UserError, match="at least 2"):
        make_truncation("gaussian", mean=1.0).check(1)


def test_unused_settings_may_hold_anything():
    make_truncation("full", start=100, mean=100.0, std=-1.0, min=9, max=3, k=0).check(5)

"""What an update draws, and the combinations of settings that are refused."""

import jax
import numpy as np
import pytest

from alignprop_jax.core.gradient_path import GradientPath
from alignprop_jax.core.truncation import make_truncation
from alignprop_jax.errors import UserError

DRAWS = 4000


def draw_many(path, num_steps):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return jax.device_get(jax.jit(jax.vmap(lambda key: path.draw(key, num_steps)))(keys))


def test_all_steps_are_run_for_the_sample():
    truncation, key = make_truncation("uniform", min=0, max=6), jax.random.key(3)
    trained, stop = GradientPath(truncation).draw(key, 6)
    assert stop is None
    np.testing.assert_array_equal(trained, truncation.draw(key, 6))


@pytest.mark.parametrize(
    ("num_steps", "share", "stops"),
    # The first is ReFL's, as its authors' code has it.
    [(40, 0.25, range(30, 40)), (50, 0.4, range(30, 50)), (10, 0.01, [9]), (4, 1.0, range(4))],
)
def test_a_prediction_is_of_one_of_the_last_steps_and_trains_it(num_steps, share, stops):
    path = GradientPath(make_truncation("last"), reward_at="prediction", stop_share=share)
    path.check(num_steps)
    trained, stop = draw_many(path, num_steps)
    np.testing.assert_array_equal(trained, np.arange(num_steps) == stop[:, None])
    values, counts = np.unique(stop, return_counts=True)
    np.testing.assert_array_equal(values, list(stops))
    probability = 1 / len(values)
    error = np.sqrt(probability * (1 - probability) / DRAWS)
    assert np.abs(counts / DRAWS - probability).max() <= 5 * error


def test_spaced_steps_and_the_stop_are_independent_and_no_step_after_it_is_trained():
    path = GradientPath(make_truncation("spaced", k=3), reward_at="prediction", stop_share=0.4)
    path.check(10)
    trained, stop = draw_many(path, 10)
    first = trained.argmax(axis=1)
    assert trained.any(axis=1).all()
    assert set(zip(first.tolist(), stop.tolist(), strict=True)) == {
        (phase, last) for phase in range(4) for last in range(6, 10)
    }
    for row, phase, last in zip(trained, first, stop, strict=True):
        spaced = phase + 3 * np.arange(3)
        np.testing.assert_array_equal(np.flatnonzero(row), spaced[spaced <= last])


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"reward_at": "noise"}, "reward_at is 'noise'"),
        ({"renoise": -1}, "renoise is -1"),
        ({"truncation": make_truncation("last", k=0)}, "truncation.k is 0"),
        ({"reward_at": "prediction", "stop_share": 0.0}, "stop_share is 0.0"),
        ({"reward_at": "prediction", "stop_share": 1.5}, "stop_share is 1.5"),
        ({"reward_at": "prediction", "renoise": 2}, "stops before there is a sample"),
        (
            {"reward_at": "prediction", "truncation": make_truncation("full")},
            "strategy is 'full', which draws from all 20 steps",
        ),
        (
            {"reward_at": "prediction", "truncation": make_truncation("uniform", max=20)},
            "set truncation.strategy to last or spaced",
        ),
        (
            {"reward_at": "prediction", "truncation": make_truncation("spaced", k=1)},
            "may be step 19, but with gradient.stop_share 0.25 sampling may stop at step 15",
        ),
    ],
)
def test_refuses_what_does_not_go_together(settings, culprit):
    with pytest.raises(UserError, match=culprit):
        GradientPath(**{"truncation": make_truncation("last"), **settings}).check(20)


def test_settings_of_a_prediction_may_be_anything_without_one():
    GradientPath(make_truncation("full"), stop_share=-1.0, renoise=3, detach_input=True).check(4)

"""What the metrics of steps must show for a run to be stopped."""

import math
from types import SimpleNamespace

import pytest

from alignprop_jax.config import default_config
from alignprop_jax.errors import UserError
from alignprop_jax.runs.gradient_watch import MAX_FIRST_AT_REST, GradientWatch, count_rest


def metrics(**changes):
    return {
        "grad_norm": 1.0,
        "start_step": 3,
        "reward_mean": 0.5,
        "skipped_in_a_row": 0,
    } | changes


def look(watch, steps, kept=None):
    for step, changes in enumerate(steps, start=1):
        watch.look(step, metrics(**changes), SimpleNamespace(latest_step=kept))


def config(**changes):
    config = default_config()
    config.update_from_flattened_dict({"reward": "mine.py:score", **changes})
    return config


REST = {"grad_norm": 0.0}


def test_first_steps_at_rest(capsys):
    watch = GradientWatch(config(), 0)
    look(watch, [REST] * (MAX_FIRST_AT_REST - 1))
    assert (
        "the gradient is exactly 0 at first; the reward 'mine.py:score'" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="exactly 0 up to step 1, so nothing .*'mine.py:score'"):
        look(watch, [REST])


@pytest.mark.parametrize(
    "steps",
    [
        [{}] + [REST] * 50,  # at rest later: it has what it wants
        [REST] * 5 + [{}] + [REST] * 50,
        [REST | {"start_step": 50}] * 50,  # no step of the sampler was drawn
        [{"grad_norm": math.nan}] + [REST] * 50,
    ],
)
def test_rest_that_is_none(steps):
    look(GradientWatch(config(), 0), steps)


@pytest.mark.parametrize(
    "earlier, rest",
    [
        ([], 0),
        ([REST, REST | {"start_step": 50}], 1),
        ([REST, {}], None),
        ([{"grad_norm": None}], None),
    ],
)
def test_a_resumed_run_goes_on_to_count(earlier, rest):
    assert count_rest(config(), [metrics(**changes) for changes in earlier]) == rest
    watch = GradientWatch(config(), rest)
    if rest is None:
        look(watch, [REST] * 50)
        return
    look(watch, [REST] * (MAX_FIRST_AT_REST - 1 - rest))
    with pytest.raises(UserError, match="so nothing is trained"):
        look(watch, [REST])


def test_a_short_run_and_one_that_trains_copies_alone():
    with pytest.raises(UserError, match="up to step 2, so nothing"):
        look(GradientWatch(config(**{"train.num_steps": 2}), 0), [REST] * 2)
    copies = config(**{"gradient.renoise": 2})
    with pytest.raises(UserError, match="up to step 10, so nothing"):
        look(GradientWatch(copies, 0), [REST | {"start_step": 50}] * 10)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"reward_mean": math.inf}, "no checkpoint yet.*mean of 'mine.py:score' is inf there"),
        (
            {"reward_mean": math.nan, "reward/a": math.nan, "reward/b": 1.0, "reward/c": -math.inf},
            "of the reward, the mean of 'a' is nan and of 'c' is -inf there: check it",
        ),
        ({"grad_norm": math.nan}, "the reward is finite there: lower config.train.learning_rate"),
    ],
)
def test_what_is_not_finite_is_named(changes, reason):
    steps = [changes | {"skipped_in_a_row": step} for step in range(1, 11)]
    look(GradientWatch(config(), 0), steps[:9])
    with pytest.raises(UserError, match=f"10 steps in a row, up to step 10 .*{reason}"):
        look(GradientWatch(config(), 0), steps)
    with pytest.raises(UserError, match="the checkpoint of step 8 is kept"):
        look(GradientWatch(config(), 0), steps, kept=8)

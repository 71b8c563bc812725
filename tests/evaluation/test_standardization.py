"""The scale of a sum's parts: measured once, on the untrained model, and then kept."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from alignprop_jax.evaluation.evaluator import Evaluator
from alignprop_jax.evaluation.standardization import standardize_parts
from alignprop_jax.records.workdir import Workdir
from alignprop_jax.rewards import Reward
from alignprop_jax.rewards.weighted_sum import weighted_sum
from alignprop_jax.runs.experiment import Experiment, Split
from tests.evaluation.test_evaluator import make_experiment

WEIGHTS = {"bright": 1.0, "large": -2.0}


@pytest.fixture
def evaluator() -> Evaluator:
    """Of a sum of the brightness and of a hundred times the square of it."""
    rewards = {
        "bright": Reward("bright", {}, lambda p, x, i: x.mean((1, 2, 3)), lambda prompts: None),
        "large": Reward(
            "large", {}, lambda p, x, i: 100 * x.mean((1, 2, 3)) ** 2, lambda prompts: None
        ),
    }
    plain = make_experiment()
    table = plain.splits["train"].table
    table = table.replace(reward_inputs=dict.fromkeys(rewards, table.reward_inputs))
    split = Split(plain.splits["train"].prompts, table)
    experiment = Experiment(
        mesh=plain.mesh,
        algorithm=None,
        chain=plain.chain,
        params={},
        reward=weighted_sum(rewards, WEIGHTS),
        splits={"train": split},
    )
    return Evaluator(experiment, jax.random.key(0), samples_per_prompt=4, batch_size=5)


def scores_of(evaluator):
    return evaluator.evaluate(None, evaluator.experiment.splits["train"]).scores


def test_parts_stay_raw_and_the_sum_is_of_standard_scores(evaluator, tmp_path):
    raw = scores_of(evaluator)
    scores = scores_of(standardize_parts(evaluator, Workdir(tmp_path)))
    expected = 0.0
    for name, weight in WEIGHTS.items():
        part = raw[f"reward/{name}"]
        np.testing.assert_array_equal(scores[f"reward/{name}"], part)
        expected += weight * (part - part.mean()) / part.std()
    np.testing.assert_allclose(scores["reward"], expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(scores["reward"], raw["reward"])


def test_the_scale_is_that_of_the_untrained_model_whatever_the_lora(evaluator, tmp_path):
    measured = []
    for name, lora in (("without", None), ("with", {"shift": np.float32(3.0)})):
        workdir = Workdir(tmp_path / name)
        standardize_parts(evaluator, workdir, lora)
        measured.append(json.loads(workdir.reward_parts.read_text()))
    assert measured[0] == measured[1]


def test_what_was_measured_is_kept_until_a_run_begins_anew(evaluator, tmp_path):
    workdir = Workdir(tmp_path)
    standardize_parts(evaluator, workdir)
    measured = json.loads(workdir.reward_parts.read_text())
    assert measured.keys() == WEIGHTS.keys()
    workdir.reward_parts.write_text(json.dumps(dict.fromkeys(WEIGHTS, (1.0, 2.0))))
    scores = scores_of(standardize_parts(evaluator, workdir))
    np.testing.assert_allclose(
        scores["reward"],
        sum(w * (scores[f"reward/{name}"] - 1) / 2 for name, w in WEIGHTS.items()),
        rtol=1e-4,
    )
    workdir.rewind(3)
    assert workdir.reward_parts.exists()
    workdir.rewind(-1)
    assert not workdir.reward_parts.exists()


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        '{"bright": [NaN, 1.0]}',
        '{"bright": [null, 1.0], "large": 3}',
        '{"large": [1, 0]}',
    ],
)
def test_a_damaged_scale_is_measured_again(evaluator, tmp_path, damage):
    workdir = Workdir(tmp_path)
    standardize_parts(evaluator, workdir)
    measured = workdir.reward_parts.read_text()
    workdir.reward_parts.write_text(damage)
    standardize_parts(evaluator, workdir)
    assert json.loads(workdir.reward_parts.read_text()) == json.loads(measured)


def test_a_scale_of_something_else_is_neither_used_nor_lost(evaluator, tmp_path):
    workdir = Workdir(tmp_path)
    scores = scores_of(standardize_parts(evaluator, workdir))
    others = json.dumps(dict.fromkeys((*WEIGHTS, "other"), (1.0, 2.0)))
    workdir.reward_parts.write_text(others)
    again = standardize_parts(evaluator, workdir, is_known=lambda name: False, keep=False)
    np.testing.assert_array_equal(scores_of(again)["reward"], scores["reward"])
    assert workdir.reward_parts.read_text() == others


def test_a_reward_of_one_part_is_left_alone(tmp_path):
    experiment = make_experiment()
    reward = dataclasses.replace(experiment.reward, parts={})
    single = dataclasses.replace(experiment, reward=reward)
    evaluator = Evaluator(single, jax.random.key(0), samples_per_prompt=1, batch_size=5)
    assert standardize_parts(evaluator, Workdir(tmp_path)) is evaluator
    assert not (tmp_path / "reward_parts.json").exists()

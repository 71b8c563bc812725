import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.algorithms.base import PromptTable
from alignprop_jax.config import default_config
from alignprop_jax.devices import sharding
from alignprop_jax.evaluation.evaluator import Evaluation, Evaluator, make_judges, summarize
from alignprop_jax.rewards import Reward
from alignprop_jax.rewards.file_size import jpeg_kilobytes
from alignprop_jax.runs.experiment import Experiment, Split

PROMPTS = [f"prompt {number}" for number in range(5)]


def make_experiment():
    """A chain whose image is its noise in [0, 1], moved by its prompt and the adapter."""

    def sample(params, adapter, inputs, adapter_timesteps):
        shift = 0.0 if adapter is None else adapter["shift"]
        if adapter_timesteps is not None:
            shift *= (adapter_timesteps[0] - adapter_timesteps[1]) / 1000
        return jax.nn.sigmoid(inputs.start + inputs.prompts.reshape(-1, 1, 1, 1) + shift)

    generator = types.SimpleNamespace(start=lambda key: jax.random.normal(key, (4, 4, 3)))

    def score(params, images, inputs):
        return params["weight"] * images.mean(axis=(1, 2, 3)) + inputs[:, 0]

    weights = {"weight": jnp.float32(2.0)}
    parts = {"half": lambda *arguments: 0.5 * score(*arguments)}
    reward = Reward(
        "mean", weights, score, lambda prompts: None, parts, lambda params, of: 2.0 * of["half"]
    )
    inputs = 100.0 * jnp.arange(5.0).reshape(5, 1)
    table = PromptTable(jnp.arange(5.0), jnp.zeros(1), inputs)
    return Experiment(
        mesh=sharding.make_mesh(),
        algorithm=None,
        chain=types.SimpleNamespace(generator=generator, sample=sample),
        params={},
        reward=reward,
        splits={"train": Split(PROMPTS, table)},
    )


def evaluate(batch_size=2, samples=3, seed=0, lora=None, scorers=None):
    experiment = make_experiment()
    evaluator = Evaluator(
        experiment, jax.random.key(seed), samples_per_prompt=samples, batch_size=batch_size
    )
    return evaluator.evaluate(lora, experiment.splits["train"], scorers)


def test_every_prompt_is_scored_with_its_own_inputs():
    rewards = evaluate().scores["reward"]
    assert rewards.shape == (15,)
    # The reward adds a hundred times the prompt's number to something in [0, 2].
    np.testing.assert_array_equal(rewards // 100, np.tile(np.arange(5), 3))


@pytest.mark.parametrize("batch_size", [1, 3, 15, 64])
def test_batch_size_and_padding_change_nothing(batch_size):
    expected, got = evaluate(batch_size=2), evaluate(batch_size=batch_size)
    np.testing.assert_allclose(got.scores["reward"], expected.scores["reward"], rtol=1e-6)
    np.testing.assert_array_equal(got.images, expected.images)


def test_noise_is_fixed_by_the_key_and_differs_between_samples():
    first, again, other = evaluate(), evaluate(), evaluate(seed=1)
    np.testing.assert_array_equal(first.scores["reward"], again.scores["reward"])
    assert not np.array_equal(first.scores["reward"], other.scores["reward"])
    assert len(np.unique(first.scores["reward"])) == 15


def test_more_samples_keep_the_first_ones():
    few, many = evaluate(samples=1), evaluate(samples=4)
    np.testing.assert_array_equal(few.scores["reward"], many.scores["reward"][:5])
    np.testing.assert_array_equal(few.images, many.images)
    assert few.images.shape == (5, 4, 4, 3) and few.images.dtype == np.uint8


def test_a_lora_moves_the_same_noise():
    base, moved = evaluate(), evaluate(lora={"shift": jnp.float32(5.0)})
    assert np.all(moved.scores["reward"] > base.scores["reward"])
    assert np.all(moved.images >= base.images)


def test_scorers_see_every_sample_once_with_its_prompt():
    seen = []

    def judge(images, prompts):
        # The last batch is filled up, so that a judge is compiled once.
        assert images.shape == (2, 4, 4, 3) and len(prompts) == 2
        seen.extend(prompts)
        return images.max(axis=(1, 2, 3))

    found = evaluate(scorers={"judge": judge})
    assert seen[:15] == PROMPTS * 3
    assert found.scores["judge"].shape == (15,)
    assert found.scores.keys() == {"reward", "reward/half", "judge"}


def test_parts_of_a_reward_are_scored_too():
    scores = evaluate().scores
    np.testing.assert_allclose(scores["reward/half"], 0.5 * scores["reward"], rtol=1e-6)


def test_samples_up_to_a_limit():
    experiment = make_experiment()
    evaluator = Evaluator(experiment, jax.random.key(0), samples_per_prompt=3, batch_size=2)
    first = evaluator.evaluate(None, experiment.splits["train"], limit=3).scores["reward"]
    np.testing.assert_array_equal(first, evaluate().scores["reward"][:3])


def test_a_range_of_timesteps_reaches_the_sampler():
    experiment = make_experiment()
    evaluator = Evaluator(experiment, jax.random.key(0), samples_per_prompt=1, batch_size=2)
    split, lora = experiment.splits["train"], {"shift": jnp.float32(5.0)}
    everywhere, nowhere = (
        evaluator.evaluate(lora, split, lora_timesteps=timesteps).scores["reward"]
        for timesteps in ((1000, 0), (1000, 1000))
    )
    np.testing.assert_allclose(everywhere, evaluator.evaluate(lora, split).scores["reward"])
    np.testing.assert_allclose(nowhere, evaluator.evaluate(None, split).scores["reward"])


def test_preview_is_the_first_batch():
    experiment = make_experiment()
    split = experiment.splits["train"]
    evaluator = Evaluator(experiment, jax.random.key(0), samples_per_prompt=2, batch_size=3)
    images, prompts = evaluator.preview(None, split)
    assert prompts == PROMPTS[:3]
    np.testing.assert_array_equal(images, evaluator.evaluate(None, split).images[:3])
    evaluator = Evaluator(experiment, jax.random.key(0), samples_per_prompt=2, batch_size=8)
    images, prompts = evaluator.preview(None, split)
    assert len(images) == len(prompts) == 5


def test_summary_is_in_double_precision():
    scores = np.array([1e8, 1.0, 3.0], np.float32)
    summary = summarize(Evaluation([], {"reward": scores}, np.zeros((0, 8, 8, 3), np.uint8)))
    assert summary["n"] == 3
    assert summary["reward_mean"] == pytest.approx((1e8 + 4.0) / 3, rel=1e-12)


def test_summary_leaves_out_samples_that_a_judge_has_no_opinion_on():
    scores = {
        "reward": np.array([1.0, np.nan], np.float32),
        "reward/part": np.array([1.0, np.nan], np.float32),
        "seen": np.array([1.0, np.nan], np.float32),
        "mute": np.array([np.nan, np.nan], np.float32),
    }
    summary = summarize(Evaluation([], scores, np.zeros((0, 8, 8, 3), np.uint8)))
    assert summary["seen_mean"] == 1.0 and summary["seen_std"] == 0.0
    assert "mute_mean" not in summary
    assert np.isnan(summary["reward_mean"]) and np.isnan(summary["reward/part_mean"])


def test_some_rewards_have_judges_of_their_own(tmp_path):
    config = default_config()
    everywhere = {"recognized", "glossy", "counted", "found", "agreement", "diversity"}
    assert make_judges(config).keys() == everywhere
    config.reward, config.remove.concept = "remove", "dog"
    assert make_judges(config).keys() == everywhere | {"concept_found", "rest_found"}
    config.model = str(tmp_path)  # a model that no judge is beside
    config.reward = {"aesthetic": 1.0, "jpeg_compress": 0.5}
    config.jpeg.quality = 50
    judges = make_judges(config)
    assert judges.keys() == {"jpeg_kb"}
    images = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        judges["jpeg_kb"](images, []), jpeg_kilobytes(quality=50)(images, [])
    )

"""Rewards by name, by file and summed; and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.rewards import Reward, check_reward, make_reward, register
from alignprop_jax.rewards.base import no_prompt_inputs
from alignprop_jax.rewards.file_size import jpeg_kilobytes
from alignprop_jax.rewards.registry import _REGISTERED
from alignprop_jax.rewards.weighted_sum import measure, standardize, weighted_sum

SHAPE = (4, 4, 3)


class Tokenizer:
    """Token ids are the lengths of the words, padded with zeros."""

    model_max_length = 5

    def __call__(self, prompts, **options):
        ids = [([len(word) for word in prompt.split()] + [0] * 5)[:5] for prompt in prompts]
        return type("Encoding", (), {"input_ids": np.array(ids)})


@pytest.fixture
def brightness(monkeypatch):
    monkeypatch.setattr("alignprop_jax.rewards.registry._REGISTERED", dict(_REGISTERED))

    @register("brightness")
    def make(gain=1.0):
        def score(params, images, inputs):
            return params["gain"] * images.mean((1, 2, 3))

        return Reward("brightness", {"gain": jnp.float32(gain)}, score, no_prompt_inputs)


def write(tmp_path, body):
    path = tmp_path / "my_reward.py"
    path.write_text(f"import jax\nimport jax.numpy as jnp\nimport numpy as np\n\n{body}\n")
    return str(path)


def user_reward(tmp_path, expression):
    path = write(tmp_path, f"def score(images, prompts):\n    return {expression}")
    return make_reward(f"{path}:score", Tokenizer())


def test_registered_reward_gets_its_options(brightness):
    reward = make_reward("brightness", None, {"brightness": {"gain": 3.0}, "aesthetic": {}})
    images = jnp.full((2, *SHAPE), 0.5)
    np.testing.assert_allclose(reward.score(reward.params, images, None), [1.5, 1.5])


def test_users_function_gets_token_ids(tmp_path):
    reward = user_reward(tmp_path, "images.mean((1, 2, 3)) + prompts[:, 1]")
    check_reward(reward, SHAPE)
    inputs = reward.prepare(["a cat", "an octopus"])
    assert inputs.dtype == np.int32
    scores = jax.jit(reward.score)(reward.params, jnp.zeros((2, *SHAPE)), inputs)
    assert scores.tolist() == [3.0, 7.0]


def test_weighted_sum_and_its_parts(brightness, tmp_path):
    path = write(tmp_path, "def words(images, prompts):\n    return (prompts > 0).sum(1) * 1.0")
    spec = {"brightness": 2.0, f"{path}:words": -0.5}
    reward = make_reward(spec, Tokenizer(), {"brightness": {"gain": 10.0}})
    check_reward(reward, SHAPE, differentiable=False)
    images = jnp.stack([jnp.full(SHAPE, 0.1), jnp.full(SHAPE, 0.2)])
    arguments = (reward.params, images, reward.prepare(["cat", "a red cat"]))
    np.testing.assert_allclose(reward.score(*arguments), [2 * 1 - 0.5, 2 * 2 - 1.5], rtol=1e-6)
    parts = {name: part(*arguments) for name, part in reward.parts.items()}
    assert list(parts) == list(spec)
    np.testing.assert_allclose(parts["brightness"], [1, 2], rtol=1e-6)
    np.testing.assert_allclose(parts[f"{path}:words"], [1, 3])

    # Standardised, a part that varies a hundred times as much counts as much as the other.
    reward = standardize(reward, {"brightness": (0.5, 0.5), f"{path}:words": (2.0, 100.0)})
    score = jax.jit(reward.score)(reward.params, *arguments[1:])
    expected = [
        2 * (1 - 0.5) / 0.5 - 0.5 * (1 - 2) / 100,
        2 * (2 - 0.5) / 0.5 - 0.5 * (3 - 2) / 100,
    ]
    np.testing.assert_allclose(score, expected, rtol=1e-5)


def test_a_sum_and_its_parts_take_one_evaluation_of_each():
    evaluations = []

    def score(params, images, inputs):
        evaluations.append(len(images))
        return images.mean((1, 2, 3)) + inputs[:, 0]

    part = Reward("mean", {}, score, lambda prompts: np.arange(len(prompts))[:, None] * 1.0)
    reward = weighted_sum({"mean": part}, {"mean": 2.0})
    arguments = (reward.params, jnp.ones((2, *SHAPE)), reward.prepare(["a", "b"]))
    scores, parts = reward.score_with_parts(*arguments)
    assert evaluations == [2]
    np.testing.assert_allclose(parts["mean"], [1, 2])
    np.testing.assert_allclose(scores, reward.score(*arguments))


def test_statistics_of_parts():
    measured = measure({"a": np.array([1.0, 3.0]), "constant": np.array([7.0, 7.0])})
    assert measured == {"a": (2.0, 1.0), "constant": (7.0, 1.0)}


def test_a_part_of_the_wrong_shape_is_named(brightness, tmp_path):
    path = write(tmp_path, "def whole(images, prompts):\n    return images.mean()")
    reward = make_reward({"brightness": 1.0, f"{path}:whole": 1.0}, Tokenizer())
    with pytest.raises(UserError, match="whole' must return one score an image"):
        check_reward(reward, SHAPE)


@pytest.mark.parametrize(
    "expression, message",
    [
        ("images.mean()", r"must return one score an image, shape \[3\] for 3 images, not \[\]"),
        ("images.mean((1, 2))", r"not \[3, 3\]"),
        ("[0.0, 1.0, 2.0]", "not list"),
        ("prompts[:, 0]", "must return floats, not int32"),
        ("np.asarray(images).mean((1, 2, 3))", "cannot be traced by JAX"),
        ("images.mean((1, 2, 3)) * (1 if images.sum() > 0 else 2)", "cannot be traced by JAX"),
        ("unknown", "fails: NameError"),
        ("exit('done')", "fails: SystemExit: done"),
        ("score(images, prompts)", "fails: RecursionError"),
        ("images.mean((1, 2, 3)) * 1j", "must return floats, not complex64"),
        (
            "jax.pure_callback(lambda x: x.mean((1, 2, 3)), prompts[:, 0] * 1.0, images)",
            "has no gradient by the image",
        ),
    ],
)
def test_bad_function_is_named(tmp_path, expression, message):
    with pytest.raises(UserError, match=rf"^reward '.*my_reward.py:score'.* {message}"):
        check_reward(user_reward(tmp_path, expression), SHAPE)


def test_a_black_box_is_for_algorithms_that_need_no_gradient():
    reward = make_reward("jpeg_compress_file", Tokenizer(), {"jpeg": {"quality": 75}})
    check_reward(reward, SHAPE, differentiable=False)
    with pytest.raises(UserError, match="jpeg_compress_file.* has no gradient .* to ddpo or rwr"):
        check_reward(reward, SHAPE)
    images = np.random.default_rng(0).random((3, 16, 24, 3), np.float32)
    scores = jax.jit(reward.score)({}, images, reward.prepare(["a cat"] * 3))
    np.testing.assert_allclose(scores, -jpeg_kilobytes(75)(images, ["a cat"] * 3), rtol=1e-6)


MEAN = "({}).mean((1, 2, 3))"
ALWAYS_0 = [
    MEAN.format("(images * 255).astype(jnp.uint8).astype(jnp.float32)"),
    MEAN.format("jnp.round(images * 255)"),
    MEAN.format("jax.lax.stop_gradient(images)"),
    MEAN.format("jnp.where(images > 0.5, 1.0, 0.0)"),
    MEAN.format("jax.jit(jnp.sign)(images)"),
    MEAN.format("jax.lax.map(jnp.floor, images)"),
    "jnp.argmax(images.reshape(len(images), -1), 1) * 1.0",
    "jnp.ones(len(images))",
]


@pytest.mark.parametrize("expression", ALWAYS_0)
def test_a_gradient_that_is_always_0_is_refused(tmp_path, expression):
    reward = user_reward(tmp_path, expression)
    check_reward(reward, SHAPE, differentiable=False)
    with pytest.raises(UserError, match="my_reward.py:score' has a gradient of exactly 0 what"):
        check_reward(reward, SHAPE)


@pytest.mark.parametrize(
    "expression",
    [
        MEAN.format("images"),
        MEAN.format("images + jax.lax.stop_gradient(jnp.round(images) - images)"),
        MEAN.format("jax.jit(jnp.square)(images)"),
        MEAN.format("jax.lax.map(jnp.sin, images)"),
        # 0 for some images alone.
        "jnp.maximum(images.mean((1, 2, 3)) - 0.9, 0)",
        "jnp.median(images.reshape(len(images), -1), axis=1)",
    ],
)
def test_a_gradient_that_can_be_other_than_0_is_allowed(tmp_path, expression):
    check_reward(user_reward(tmp_path, expression), SHAPE)


def test_the_part_of_a_sum_without_a_gradient_is_named(brightness, tmp_path):
    spec = (
        f"{write(tmp_path, 'def words(images, prompts):  return (prompts > 0).sum(1) * 1.0')}:words"
    )
    with pytest.raises(UserError, match="my_reward.py:words' has a gradient of exactly 0"):
        check_reward(make_reward({"brightness": 1.0, spec: 0.5}, Tokenizer()), SHAPE)
    # Where it has no weight, it is there to be watched.
    check_reward(make_reward({"brightness": 1.0, spec: 0.0}, Tokenizer()), SHAPE)


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"aesthetic": math.inf}, "weight of reward 'aesthetic' must be finite, not inf"),
        ({"aesthetic": True}, "weight of reward 'aesthetic' must be a number, not True"),
        ({"aesthetic": 0.0}, "needs one at least"),
        ("asthetic", "reward 'asthetic' not found; give aesthetic, .* or path/to/file.py:function"),
        ("missing.py:score", "no file 'missing.py'"),
        ({"aesthetic": "much"}, "weight of reward 'aesthetic' must be a number"),
        ({}, "needs one at least"),
    ],
)
def test_reward_not_found(spec, message, monkeypatch):
    monkeypatch.setitem(_REGISTERED, "aesthetic", _REGISTERED["jpeg_compress"])
    with pytest.raises(UserError, match=message):
        make_reward(spec, Tokenizer())


def test_file_without_the_function(tmp_path):
    with pytest.raises(UserError, match="has no function 'scored'"):
        make_reward(f"{write(tmp_path, '')}:scored", Tokenizer())


@pytest.mark.parametrize(
    "body, message",
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("def score(images, prompts:", "SyntaxError"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("def again(): again()\nagain()", "RecursionError"),
        ("raise ValueError('x' * 10_000)", "ValueError: x{200,300}$"),
    ],
)
def test_file_that_fails(tmp_path, body, message):
    with pytest.raises(UserError, match=f"^reward '.*my_reward.py:score' fails: {message}"):
        make_reward(f"{write(tmp_path, body)}:score", Tokenizer())


def test_a_file_may_define_dataclasses(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text("""from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Brightness:
    gain: float

    def __call__(self, images, prompts):
        return self.gain * images.mean((1, 2, 3))

score = Brightness(2.0)
""")
    check_reward(make_reward(f"{path}:score", Tokenizer()), SHAPE)


def test_a_function_of_other_arguments(tmp_path):
    path = write(tmp_path, "def score(images):\n    return images.mean((1, 2, 3))")
    with pytest.raises(UserError, match="my_reward.py:score' fails: TypeError: score.. takes 1"):
        check_reward(make_reward(f"{path}:score", Tokenizer()), SHAPE)


def test_a_score_that_is_not_finite_has_no_scale():
    with pytest.raises(UserError, match="'a' is NaN or infinite for 1 of 2 samples"):
        measure({"a": np.array([1.0, np.inf])})

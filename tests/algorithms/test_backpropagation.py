"""The AlignProp step: its update derived by hand on a chain that is one line of arithmetic."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignprop_jax.algorithms.accumulation import accumulate_gradients
from alignprop_jax.algorithms.backpropagation import Backpropagation
from alignprop_jax.algorithms.base import Frozen, PromptTable, Setup
from alignprop_jax.algorithms.losses import make_loss
from alignprop_jax.algorithms.optimizer import make_optimizer
from alignprop_jax.algorithms.prompt_order import prompt_indices
from alignprop_jax.algorithms.state import create_train_state
from alignprop_jax.core.gradient_path import StepDraw
from alignprop_jax.errors import UserError
from alignprop_jax.lora.adapters import Lora
from alignprop_jax.rewards.base import Reward, no_prompt_inputs

NUM_STEPS = 4
NUM_PROMPTS = 5
BATCH = 6
LORA_SCALE = 0.5


class ToyChain:
    """Brightness that grows with the factors at each trained step; texture from the start."""

    generator = SimpleNamespace(start=lambda key: jax.random.normal(key, (2, 2, 3)))
    num_steps = NUM_STEPS

    def sample(self, params, adapter, inputs, trained, never_trained=0):
        assert inputs.keys.shape == inputs.start.shape[:1]
        factors = adapter.tree["layer"]["down"] @ adapter.tree["layer"]["up"]
        change = jnp.mean(trained) * params["network"] * jnp.sum(factors)
        brightness = change + inputs.prompts - inputs.negative
        return 0.1 * inputs.start + brightness[:, None, None, None]

    def sample_with_copies(self, params, adapter, inputs, trained, copies, never_trained=0):
        return jnp.repeat(self.sample(params, adapter, inputs, trained), 1 + copies, axis=0)


def toy_reward(parts=False):
    def score(params, images, inputs):
        return params * jnp.mean(images, axis=(1, 2, 3)) + inputs

    named = {"half": lambda *args: score(*args) / 2, "double": lambda *args: 2 * score(*args)}
    reward = Reward("toy", jnp.float32(3.0), score, no_prompt_inputs)
    if not parts:
        return reward

    def add_up(params, scores):
        return (scores["half"] + scores["double"]) / 2.5

    return dataclasses.replace(reward, parts=named, add_up=add_up)


@pytest.fixture
def lora():
    rng = np.random.default_rng(0)
    return {
        "layer": {
            "down": jnp.asarray(rng.standard_normal((3, 2)), jnp.float32),
            "up": jnp.asarray(rng.standard_normal((2, 3)), jnp.float32),
        }
    }


@pytest.fixture
def prompts():
    rng = np.random.default_rng(1)
    return PromptTable(
        encoded=jnp.asarray(rng.standard_normal(NUM_PROMPTS), jnp.float32),
        negative=jnp.asarray(rng.standard_normal(1), jnp.float32),
        reward_inputs=jnp.arange(NUM_PROMPTS, dtype=jnp.float32),
    )


def make_step(optimizer, *, reward=None, trained=(0, 1, 1, 1), copies=0, microbatch_size=0):
    path = SimpleNamespace(
        draw=lambda key, num_steps: StepDraw(jnp.asarray(trained, bool), None),
        renoise=copies,
        never_trained=lambda num_steps: 0,
    )
    algorithm = Backpropagation(path, make_loss("target", target=10.0, scale=0.1))
    adaptation = Lora(rank=2, alpha=2 * LORA_SCALE)
    setup = Setup(ToyChain(), reward or toy_reward(), adaptation, optimizer, BATCH, microbatch_size)
    step = jax.jit(algorithm.make_step(setup))

    def train_step(reward_params, prompts, state):
        return step(Frozen({"network": jnp.float32(0.2)}, reward_params, prompts), state)

    return train_step


REWARD_PARAMS = jnp.float32(3.0)


def test_update_is_the_one_derived_by_hand(lora, prompts):
    optimizer = optax.sgd(0.5)
    state = create_train_state(lora, optimizer, jax.random.key(0))
    new, metrics = make_step(optimizer)(REWARD_PARAMS, prompts, state)

    down, up = (np.asarray(lora["layer"][name], np.float64) for name in ("down", "up"))
    # d loss / d reward = -0.1 below the target, d reward / d brightness = 3, and
    # brightness = 3/4 * 0.2 * sum(down @ (0.5 up)).
    slope = -0.1 * 3 * 0.75 * 0.2 * LORA_SCALE
    by_down = slope * np.ones((3, 3)) @ up.T
    by_up = slope * down.T @ np.ones((3, 3))
    np.testing.assert_allclose(new.lora["layer"]["down"], down - 0.5 * by_down, rtol=1e-5)
    np.testing.assert_allclose(new.lora["layer"]["up"], up - 0.5 * by_up, rtol=1e-5)
    norm = np.sqrt(np.sum(by_down**2) + np.sum(by_up**2))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    # Below the target, the loss is linear in the reward.
    np.testing.assert_allclose(metrics["loss"], 0.1 * (10 - metrics["reward_mean"]), rtol=1e-5)
    assert metrics["start_step"] == 1
    assert new.step == 1
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 0


@pytest.mark.parametrize("microbatch_size", [0, 2])
def test_losses_of_copies_are_summed_each_with_the_prompt_of_its_sample(
    lora, prompts, microbatch_size
):
    optimizer = optax.sgd(0.5)
    state = create_train_state(lora, optimizer, jax.random.key(0))

    def step(copies):
        train_step = make_step(optimizer, copies=copies, microbatch_size=microbatch_size)
        return train_step(REWARD_PARAMS, prompts, state)

    (one, metrics), (three, metrics_of_three) = step(0), step(2)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics_of_three[name], 3 * metrics[name], rtol=1e-5)
    for name in ("reward_mean", "reward_std"):
        np.testing.assert_allclose(metrics_of_three[name], metrics[name], rtol=1e-5)
    for leaf in ("down", "up"):
        old, new, tripled = (tree["layer"][leaf] for tree in (state.lora, one.lora, three.lora))
        np.testing.assert_allclose(tripled - old, 3 * (new - old), rtol=1e-4, atol=1e-6)


def test_metrics_are_of_the_whole_batch(lora, prompts):
    optimizer = optax.sgd(0.0)
    state = create_train_state(lora, optimizer, jax.random.key(0))
    seen = []

    def score(params, images, inputs):
        scores = jnp.mean(images, axis=(1, 2, 3)) + inputs
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), scores)
        return scores

    reward = Reward("observed", None, score, no_prompt_inputs)
    step = make_step(optimizer, reward=reward, microbatch_size=2)
    _, metrics = step(None, prompts, state)
    jax.effects_barrier()
    scores = np.concatenate(seen)
    assert len(scores) == BATCH
    assert len(np.unique(scores)) == BATCH
    np.testing.assert_allclose(metrics["reward_mean"], scores.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_std"], scores.std(), rtol=1e-5)


def test_parts_of_a_reward_are_reported_by_name(lora, prompts):
    optimizer = optax.sgd(0.0)
    state = create_train_state(lora, optimizer, jax.random.key(0))
    step = make_step(optimizer, reward=toy_reward(parts=True))
    _, metrics = step(REWARD_PARAMS, prompts, state)
    np.testing.assert_allclose(metrics["reward/half"], metrics["reward_mean"] / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/double"], 2 * metrics["reward_mean"], rtol=1e-6)


@pytest.mark.parametrize("microbatch_size", [1, 2, 3])
def test_microbatches_give_the_step_of_the_whole_batch(lora, prompts, microbatch_size):
    optimizer = make_optimizer(1e-2)
    # A square, so that the gradient differs from image to image.
    reward = Reward(
        "square", None, lambda _, x, inputs: jnp.mean(x, axis=(1, 2, 3)) ** 2, no_prompt_inputs
    )

    def two_steps(**options):
        step = make_step(optimizer, reward=reward, **options)
        state = create_train_state(lora, optimizer, jax.random.key(0))
        state, _ = step(None, prompts, state)
        return step(None, prompts, state)

    whole, split = two_steps(), two_steps(microbatch_size=microbatch_size)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), whole[1], split[1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole[0].lora, split[0].lora
    )


def test_accumulation_is_exact_and_keeps_the_order():
    x = jnp.arange(12.0).reshape(6, 2)

    def objective(w, batch):
        values = jnp.sum(batch * w[None, :], axis=1) ** 2
        return jnp.mean(values), {"values": values}

    w = jnp.asarray([1.0, -0.5])
    whole = accumulate_gradients(objective, w, x, 1)
    split = accumulate_gradients(objective, w, x, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, split)


def test_steps_differ_and_a_resumed_run_repeats_them(lora, prompts):
    optimizer = make_optimizer(1e-2)
    step = make_step(optimizer)
    state = create_train_state(lora, optimizer, jax.random.key(0))
    first, first_metrics = step(REWARD_PARAMS, prompts, state)
    _, second_metrics = step(REWARD_PARAMS, prompts, first)
    assert first_metrics["reward_mean"] != second_metrics["reward_mean"]
    restored = jax.tree.map(jnp.copy, first)
    _, again = step(REWARD_PARAMS, prompts, restored)
    jax.tree.map(np.testing.assert_array_equal, second_metrics, again)
    other = create_train_state(lora, optimizer, jax.random.key(1))
    _, other_metrics = step(REWARD_PARAMS, prompts, other)
    assert first_metrics["reward_mean"] != other_metrics["reward_mean"]


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(lora, prompts, value):
    optimizer = make_optimizer(1e-2)
    step = make_step(optimizer)
    state = create_train_state(lora, optimizer, jax.random.key(0))
    state, _ = step(REWARD_PARAMS, prompts, state)
    for count in (1, 2):
        skipped, metrics = step(jnp.float32(value), prompts, state)
        for name in ("lora", "opt_state"):
            jax.tree.map(
                np.testing.assert_array_equal, getattr(skipped, name), getattr(state, name)
            )
        assert skipped.step == state.step + 1
        assert metrics["skipped"] == metrics["skipped_in_a_row"] == count
        state = skipped
    state, metrics = step(REWARD_PARAMS, prompts, state)
    assert metrics["skipped"] == 2
    assert metrics["skipped_in_a_row"] == 0
    assert np.all(state.lora["layer"]["up"] != skipped.lora["layer"]["up"])


def test_nothing_trained_means_no_gradient_and_says_so(lora, prompts):
    optimizer = optax.sgd(1.0)
    state = create_train_state(lora, optimizer, jax.random.key(0))
    step = make_step(optimizer, trained=(0,) * NUM_STEPS)
    new, metrics = step(REWARD_PARAMS, prompts, state)
    assert metrics["start_step"] == NUM_STEPS
    assert metrics["grad_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, new.lora, lora)


def test_clipping_limits_the_norm_before_adamw():
    optimizer = make_optimizer(0.1, weight_decay=0.5, epsilon=1.0, max_grad_norm=1.0)
    weights = jnp.asarray([2.0, -1.0])
    gradient = jnp.asarray([30.0, 40.0])
    updates, _ = optimizer.update(gradient, optimizer.init(weights), weights)
    clipped = np.asarray([0.6, 0.8])
    # Bias correction makes Adam's first moment g and its second g^2.
    wanted = -0.1 * (clipped / (clipped + 1.0) + 0.5 * np.asarray(weights))
    np.testing.assert_allclose(updates, wanted, rtol=1e-4)


@pytest.mark.parametrize(("batch_size", "num_prompts"), [(8, 45), (3, 3), (7, 3), (1, 4), (5, 1)])
def test_prompts_are_dealt_round_by_round(batch_size, num_prompts):
    num_batches = 3 * num_prompts
    indices = jax.jit(
        jax.vmap(lambda step: prompt_indices(jax.random.key(0), step, batch_size, num_prompts))
    )(jnp.arange(num_batches))
    rounds = np.asarray(indices).reshape(-1, num_prompts)
    assert rounds.shape[0] == 3 * batch_size
    np.testing.assert_array_equal(
        np.sort(rounds, axis=1), np.tile(np.arange(num_prompts), (len(rounds), 1))
    )
    if num_prompts > 10:
        assert len({tuple(order) for order in rounds}) == len(rounds)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [("target", [3.5, 0.0, 2.0]), ("one_minus", [1.0, -2.5, -4.5]), ("negative", [0.5, -3, -5])],
)
def test_loss_shapes(shape, wanted):
    loss = make_loss(shape, target=6.0, scale=0.5)
    np.testing.assert_allclose(loss(jnp.asarray([-1.0, 6.0, 10.0])), wanted)


def test_refuses_settings_it_cannot_follow():
    with pytest.raises(UserError, match="loss.shape is 'hinge'"):
        make_loss("hinge")
    with pytest.raises(UserError, match="microbatch_size is 4"):
        make_step(optax.sgd(1.0), microbatch_size=4)

"""Two generators of a few lines, of a number and of one token, through the same train step.

They share nothing with a diffusion model of pictures but the protocol. The update of each is
compared with a gradient that is derived by hand.
"""

from types import SimpleNamespace
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignprop_jax.algorithms.backpropagation import Backpropagation
from alignprop_jax.algorithms.base import Frozen, PromptTable, Setup
from alignprop_jax.algorithms.ddpo import DDPO
from alignprop_jax.algorithms.losses import make_loss
from alignprop_jax.algorithms.state import create_train_state
from alignprop_jax.core.chain import Chain
from alignprop_jax.core.generator import Generator
from alignprop_jax.core.gradient_path import StepDraw
from alignprop_jax.core.guidance import Unguided
from alignprop_jax.rewards.base import Reward, no_prompt_inputs

BATCH, LEARNING_RATE = 64, 0.5
PROMPTS = PromptTable(jnp.zeros((1, 0)), jnp.zeros((1, 0)), jnp.zeros((1, 0)))


class Steps(NamedTuple):
    timesteps: np.ndarray
    scale: np.ndarray  # what a step leaves of the state

    def ending_at(self, index):
        return self._replace(scale=jnp.where(jnp.arange(len(self.scale)) == index, 0, self.scale))

    def repeating_the_last(self, times):
        return jax.tree.map(lambda x: np.append(x, np.repeat(x[-1:], times)), self)


@flax.struct.dataclass
class Added:
    """The adapter of both: what is added to the network's output."""

    value: jax.Array

    def scaled(self, scale):
        return Added(self.value * scale)

    def variables(self, weights):
        return {"params": weights}


class Adding:
    def bind(self, tree):
        return Added(tree)


class Toy:
    num_timesteps = 1000

    def network(self, params):
        return params

    def guidance(self, scale, shared=True):
        return Unguided()

    def schedule(self, num_steps, eta=0.0):
        return Steps(np.arange(num_steps)[::-1], np.linspace(0.5, 0.9, num_steps))

    def rematerialized(self):
        return self

    on_one_device = rematerialized

    def weights_that_tell(self, params):
        return [params]

    def denoising_loss(self, predict, state, keys):
        raise NotImplementedError


class OneNumber(Toy):
    """x <- scale x + prediction, and with eta above 0 a standard normal number more."""

    sample_shape = ()

    def start(self, key):
        return jax.random.normal(key)

    def is_random(self, eta):
        return eta > 0

    def predict(self, weights, adapter, state, at, prompts):
        return jnp.sin(state) * weights + adapter.value

    def advance(self, prediction, state, at, keys):
        moved = at.scale * state + prediction
        return moved if keys is None else moved + jax.vmap(jax.random.normal)(keys)

    def renoise(self, state, at, keys):
        return state + jax.vmap(jax.random.normal)(keys)

    def log_prob(self, prediction, state, next_state, at):
        return -0.5 * (next_state - at.scale * state - prediction) ** 2

    def finish(self, params, state):
        return state


class Text(NamedTuple):
    token: jax.Array  # [b] whole numbers, which have no gradient
    soft: jax.Array  # [b, k], the token as one-hot, whose gradient is that of its probabilities


class OneToken(Toy):
    """The next token is drawn by logits that depend on the last; three symbols."""

    sample_shape = (3,)

    def start(self, key):
        token = jax.random.randint(key, (), 0, 3)
        return Text(token, jax.nn.one_hot(token, 3))

    def is_random(self, eta):
        return True

    def predict(self, weights, adapter, state, at, prompts):
        return state.soft @ weights + adapter.value[None]

    def advance(self, prediction, state, at, keys):
        token = jax.vmap(jax.random.categorical)(keys, prediction)
        probabilities = jax.nn.softmax(prediction)
        hard = jax.nn.one_hot(token, 3)
        return Text(token, hard + probabilities - jax.lax.stop_gradient(probabilities))

    def renoise(self, state, at, keys):
        token = jax.vmap(lambda key: jax.random.randint(key, (), 0, 3))(keys)
        return Text(token, jax.nn.one_hot(token, 3))

    def log_prob(self, prediction, state, next_state, at):
        log_probabilities = jax.nn.log_softmax(prediction)
        return jnp.take_along_axis(log_probabilities, next_state.token[:, None], 1)[:, 0]

    def finish(self, params, state):
        return state.soft


def update(generator, weights, tree, score, trained, copies=0, stop=None):
    """One step of gradient descent on -score, by the train step; returns minus the gradient."""
    path = SimpleNamespace(
        draw=lambda key, num_steps: StepDraw(jnp.asarray(trained, bool), stop),
        renoise=copies,
        never_trained=lambda num_steps: 0,
    )
    reward = Reward("score", None, lambda params, samples, inputs: score(samples), no_prompt_inputs)
    optimizer = optax.sgd(LEARNING_RATE)
    chain = Chain(generator, len(trained), generator.guidance(1.0), remat="step")
    setup = Setup(chain, reward, Adding(), optimizer, BATCH, microbatch_size=16)
    step = jax.jit(Backpropagation(path, make_loss("negative")).make_step(setup))
    state = create_train_state(tree, optimizer, jax.random.key(0))
    new, metrics = step(Frozen(weights, None, PROMPTS), state)
    assert metrics["skipped"] == 0
    return (new.lora - tree) / LEARNING_RATE, metrics


def chain_keys():
    """What the train step gives each sample of its first step: keys of its start and its chain."""
    _, noise_key = jax.random.split(jax.random.key(0))
    _, samples_key = jax.random.split(jax.random.fold_in(noise_key, 0))
    keys = jax.random.split(samples_key, BATCH)
    return jax.vmap(jax.random.split, out_axes=1)(keys)


@pytest.mark.parametrize("generator", [OneNumber(), OneToken()])
def test_they_are_generators(generator):
    assert isinstance(generator, Generator)


@pytest.mark.parametrize("trained", [(1, 1, 1, 1), (0, 0, 1, 1), (1, 0, 0, 1)])
def test_a_number_follows_the_gradient_of_its_chain(trained):
    weight, added = 0.3, 0.2
    gradient, metrics = update(
        OneNumber(), jnp.float32(weight), jnp.float32(added), lambda x: -((x - 2) ** 2), trained
    )
    x = np.asarray(jax.vmap(jax.random.normal)(chain_keys()[0]), np.float64)
    slope = np.zeros(BATCH)  # dx / d added
    for is_trained, scale in zip(trained, np.linspace(0.5, 0.9, 4), strict=True):
        # An untrained prediction is a constant; its state still carries the gradient on.
        slope = scale * slope + is_trained * (weight * np.cos(x) * slope + 1)
        x = scale * x + weight * np.sin(x) + added
    np.testing.assert_allclose(gradient, np.mean(-2 * (x - 2) * slope), rtol=1e-4)
    np.testing.assert_allclose(metrics["reward_mean"], np.mean(-((x - 2) ** 2)), rtol=1e-4)


def test_a_number_stops_early_at_what_it_predicts():
    gradient, metrics = update(
        OneNumber(), jnp.float32(0.3), jnp.float32(0.2), lambda x: x, (1, 1, 0), stop=jnp.int32(1)
    )
    x = np.asarray(jax.vmap(jax.random.normal)(chain_keys()[0]), np.float64)
    # After one step of scale 0.5, the one that is the last keeps nothing of the state.
    after = 0.5 * x + 0.3 * np.sin(x) + 0.2
    np.testing.assert_allclose(
        metrics["reward_mean"], np.mean(0.3 * np.sin(after) + 0.2), rtol=1e-4
    )
    np.testing.assert_allclose(gradient, np.mean(1 + 0.3 * np.cos(after)), rtol=1e-4)


def test_a_token_follows_the_gradient_of_its_probabilities():
    """Two steps; the derivative of probabilities by logits is diag(p) - p p^T."""
    rng = np.random.default_rng(0)
    weights, added, worth = rng.normal(size=(3, 3)), rng.normal(size=3), np.array([1.0, -2.0, 0.5])
    gradient, metrics = update(
        OneToken(),
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(added, jnp.float32),
        lambda soft: soft @ jnp.asarray(worth, jnp.float32),
        (1, 1),
    )
    start_keys, keys = chain_keys()
    wanted, rewards = [], []
    for start_key, key in zip(start_keys, keys, strict=True):
        token = int(jax.random.randint(start_key, (), 0, 3))
        derivatives = []
        for index in range(2):
            logits = weights[token] + added
            p = np.exp(logits) / np.exp(logits).sum()
            derivatives.append(np.diag(p) - np.outer(p, p))
            drawn = jax.random.categorical(jax.random.fold_in(key, index), jnp.float32(logits))
            token = int(drawn)
        by_last = derivatives[1] @ worth
        wanted.append(by_last + derivatives[0] @ weights @ by_last)
        rewards.append(worth[token])
    np.testing.assert_allclose(gradient, np.mean(wanted, 0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["reward_mean"], np.mean(rewards), rtol=1e-5)


def test_a_token_has_copies_each_from_its_own_noise():
    gradient, metrics = update(
        OneToken(),
        jnp.zeros((3, 3)),
        jnp.zeros(3),
        lambda soft: soft @ jnp.array([1.0, 0.0, 0.0]),
        (0, 0, 1),
        copies=2,
    )
    # Each of three samples has probabilities of a third, whatever was drawn before.
    third = np.full(3, 1 / 3)
    jacobian = np.diag(third) - np.outer(third, third)
    np.testing.assert_allclose(gradient, 3 * jacobian[0], rtol=1e-4, atol=1e-6)
    assert 0.2 < metrics["reward_mean"] < 0.5


def test_a_policy_gradient_raises_the_token_that_pays():
    reward = Reward("first", None, lambda params, soft, inputs: soft[:, 0], no_prompt_inputs)
    optimizer = optax.sgd(1.0)
    chain = Chain(OneToken(), 2, Unguided(), eta=1.0)
    algorithm = DDPO(1, 1, BATCH, clip_range=0.2, max_advantage=5.0)
    setup = Setup(chain, reward, Adding(), optimizer, BATCH)
    step = jax.jit(algorithm.make_step(setup))
    state = create_train_state(
        jnp.zeros(3), optimizer, jax.random.key(0), algorithm.start_history(1)
    )
    means = []
    for _ in range(20):
        state, metrics = step(Frozen(jnp.zeros((3, 3)), None, PROMPTS), state)
        means.append(float(metrics["reward_mean"]))
    assert means[0] < 0.5 and means[-1] > 0.9

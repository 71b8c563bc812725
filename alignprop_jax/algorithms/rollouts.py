"""Algorithms that need no gradient of the reward: sample, score, and fit to the samples.

One step draws samples with the adapter as it is, scores them, and makes several updates from them.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from alignprop_jax.algorithms.accumulation import (
    accumulate_gradients,
    map_microbatches,
    split_into,
)
from alignprop_jax.algorithms.advantages import PromptHistory
from alignprop_jax.algorithms.base import (
    Draw,
    Frozen,
    PromptTable,
    Setup,
    TrainStep,
    chain_inputs,
    count_microbatches,
    draw_batch,
    reward_metrics,
)
from alignprop_jax.algorithms.optimizer import descend_if
from alignprop_jax.algorithms.state import TrainState
from alignprop_jax.core.chain import Chain
from alignprop_jax.core.generator import Adapter
from alignprop_jax.errors import UserError


@flax.struct.dataclass
class Rollouts:
    """Samples and what they are worth."""

    prompts: Int[Array, " b"]  # indices
    keys: Key[Array, " b"]
    states: PyTree  # [b, t+1, ...], see `chain.Trajectory`
    log_probs: Float[Array, "b t"]
    advantages: Float[Array, " b"]  # see `PromptHistory.advantages`


@dataclasses.dataclass(frozen=True)
class Fit:
    """What an algorithm makes of its samples.

    Attributes:
        expand: `expand(rollouts, update) -> examples`, arrays of a leading axis b * n, the n
            examples of each sample one after the other; `update` counts the updates of a step.
        examples_per_sample: n.
        loss: `loss(params, prompts, adapter, examples) -> (losses, extras)`, of each example its
            loss and scalars to report by name; `params` are the frozen ones.
        weigh: turns the advantages of a whole batch into what `expand` finds as such.
    """

    expand: Callable[[Rollouts, Int[Array, ""]], PyTree]
    examples_per_sample: int
    loss: Callable[
        [Any, PromptTable, Adapter, PyTree],
        tuple[Float[Array, " e"], dict[str, Float[Array, " e"]]],
    ]
    weigh: Callable[[Float[Array, " b"]], Float[Array, " b"]]


@dataclasses.dataclass(frozen=True)
class FromRollouts(abc.ABC):
    """What DDPO and RWR have in common.

    The state's history is a `PromptHistory`. An update whose gradient is not finite is left out,
    and its step counted in the state. Metrics are those of every algorithm and the means of what
    `Fit.loss` reports; `loss` and `grad_norm` are means over the updates, `start_step` is 0.

    Attributes:
        epochs: how many times every sample is used.
        minibatches: updates an epoch, each of a part of the samples.
        history: rewards of a prompt that its next ones are compared with.
    """

    epochs: int
    minibatches: int
    history: int

    needs_reward_gradient = False
    shares_guidance = False
    detaches_input = False

    @abc.abstractmethod
    def fit(self, chain: Chain) -> Fit:
        """What is made of the samples of a chain."""

    def steps_kept(self, num_steps: int) -> tuple[float, float]:
        return num_steps, num_steps

    def open_gates(self, num_steps: int) -> tuple[float, float]:
        return 1.0, 1.0

    def start_history(self, num_prompts: int) -> PromptHistory:
        return PromptHistory.create(num_prompts, self.history)

    def check_batch(self, batch_size: int, num_devices: int) -> None:
        if batch_size % self.minibatches:
            raise UserError(
                f"train.batch_size is {batch_size}; it must be a multiple of the number of "
                f"minibatches, {self.minibatches}"
            )
        if batch_size // self.minibatches % num_devices:
            raise UserError(
                f"config.train.batch_size / config.rollouts.minibatches="
                f"{batch_size // self.minibatches} must be a multiple of the number of devices, "
                f"{num_devices}"
            )

    def make_step(self, setup: Setup) -> TrainStep:
        self.check_batch(setup.batch_size, 1)
        chain, reward, fit = setup.chain, setup.reward, self.fit(setup.chain)
        minibatch_size = setup.batch_size // self.minibatches
        sampled_at_a_time = count_microbatches(setup.batch_size, setup.microbatch_size)
        fitted_at_a_time = count_microbatches(
            minibatch_size, min(setup.microbatch_size, minibatch_size)
        )

        def train_step(frozen: Frozen, state: TrainState):
            order_key, noise_key = jax.random.split(state.key)
            samples_key = jax.random.fold_in(noise_key, state.step)
            batch = draw_batch(order_key, samples_key, state.step, setup, frozen.prompts)
            _, (states, log_probs, scores, parts) = setup.split_batch(draw)(
                (frozen, state.lora), batch
            )
            history = state.history.add(batch.indices, scores)
            advantages = fit.weigh(history.advantages(batch.indices, scores))
            rollouts = Rollouts(batch.indices, batch.keys, states, log_probs, advantages)
            by_minibatch = split_into(self.minibatches, rollouts)

            def update(carried, number):
                tree, opt_state = carried
                minibatch = jax.tree.map(lambda x: x[number % self.minibatches], by_minibatch)
                (value, gradient), extras = setup.split_batch(differentiate)(
                    (frozen, tree, number), minibatch
                )
                grad_norm = optax.tree.norm(gradient)
                finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
                carried = descend_if(finite, setup.optimizer, gradient, tree, opt_state)
                return carried, {"loss": value, "grad_norm": grad_norm, **extras}

            carried, updates = jax.lax.scan(
                update, (state.lora, state.opt_state), jnp.arange(self.epochs * self.minibatches)
            )
            means = jax.tree.map(jnp.mean, updates)
            finite = jnp.isfinite(means["loss"]) & jnp.isfinite(means["grad_norm"])
            scored = jnp.isfinite(scores).all()
            history = jax.tree.map(
                lambda new, old: jnp.where(scored, new, old), history, state.history
            )
            state = state.after(finite, *carried, history)
            metrics = {
                **means,
                **reward_metrics(scores, parts),
                "start_step": jnp.zeros((), jnp.int32),
                "skipped": state.skipped,
                "skipped_in_a_row": state.skipped_in_a_row,
            }
            return state, metrics

        def draw(shared, batch: Draw):
            frozen, tree = shared

            def draw_microbatch(batch: Draw):
                inputs, reward_inputs = chain_inputs(chain.generator, frozen.prompts, batch)
                adapter = setup.adaptation.bind(tree)
                trajectory = chain.sample_trajectory(frozen.params, adapter, inputs)
                scored = reward.score_with_parts(
                    frozen.reward_params, trajectory.samples, reward_inputs
                )
                return trajectory.states, trajectory.log_probs, *scored

            return (), map_microbatches(draw_microbatch, batch, sampled_at_a_time)

        def differentiate(shared, rollouts: Rollouts):
            frozen, tree, number = shared

            def objective(tree, examples):
                adapter = setup.adaptation.bind(tree)
                losses, extras = fit.loss(frozen.params, frozen.prompts, adapter, examples)
                return jnp.mean(losses), extras

            examples = fit.expand(rollouts, number)
            value, extras, gradient = accumulate_gradients(
                objective, tree, examples, fitted_at_a_time * fit.examples_per_sample
            )
            return (value, gradient), extras

        return train_step

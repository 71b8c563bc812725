"""AlignProp and its relatives: the reward's gradient, through the chain, to what is trained."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from alignprop_jax.algorithms.accumulation import accumulate_gradients
from alignprop_jax.algorithms.base import (
    Draw,
    Frozen,
    Setup,
    TrainStep,
    chain_inputs,
    count_microbatches,
    draw_batch,
    reward_metrics,
)
from alignprop_jax.algorithms.losses import Loss
from alignprop_jax.algorithms.optimizer import descend_if
from alignprop_jax.algorithms.state import TrainState
from alignprop_jax.core.chain import Chain, Inputs, steps_apart
from alignprop_jax.core.generator import Adapter
from alignprop_jax.core.gradient_path import GradientPath, StepDraw
from alignprop_jax.core.truncation import first_trained_step

# Draws of the trained steps whose mean is what a step costs.
_NUM_DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Backpropagation:
    """One update of AlignProp (arXiv 2310.03739, algorithm 1) or of a relative of it.

    Attributes:
        path: which steps are run and trained, drawn once a step for the whole batch.
        loss: turns rewards into losses, from `losses.make_loss`. Where a start gives n samples, the
            loss is the sum of their losses.
    """

    path: GradientPath
    loss: Loss

    needs_reward_gradient = True
    shares_guidance = True

    @property
    def detaches_input(self) -> bool:
        return self.path.detach_input

    def steps_kept(self, num_steps: int) -> tuple[float, float]:
        apart = steps_apart(self.path.never_trained(num_steps), num_steps)
        num_kept = num_steps - apart + self.path.renoise
        return num_kept, self.path.truncation.expected_steps(num_steps) + self.path.renoise

    def open_gates(self, num_steps: int) -> tuple[float, float]:
        keys = jax.random.split(jax.random.key(0), _NUM_DRAWS)
        draw = jax.jit(jax.vmap(lambda key: self.path.draw(key, num_steps)))(keys)
        copies = self.path.renoise
        trained = float(draw.trained.sum(1).mean() + copies) / (num_steps + copies)
        run = 1.0 if draw.stop is None else float((draw.stop + 1).mean()) / num_steps
        return trained, run

    def start_history(self, num_prompts: int) -> None:
        del num_prompts

    def check_batch(self, batch_size: int, num_devices: int) -> None:
        del batch_size, num_devices

    def make_step(self, setup: Setup) -> TrainStep:
        chain, reward = setup.chain, setup.reward
        num_microbatches = count_microbatches(setup.batch_size, setup.microbatch_size)

        def train_step(frozen: Frozen, state: TrainState):
            order_key, noise_key = jax.random.split(state.key)
            truncation_key, samples_key = jax.random.split(
                jax.random.fold_in(noise_key, state.step)
            )
            steps = self.path.draw(truncation_key, chain.num_steps)
            batch = draw_batch(order_key, samples_key, state.step, setup, frozen.prompts)
            shared = (frozen, state.lora, steps)
            (value, gradient), (scores, parts) = setup.split_batch(differentiate)(shared, batch)
            grad_norm = optax.tree.norm(gradient)
            finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
            state = state.after(
                finite,
                *descend_if(finite, setup.optimizer, gradient, state.lora, state.opt_state),
            )
            metrics = {
                "loss": value,
                **reward_metrics(scores, parts),
                "grad_norm": grad_norm,
                "start_step": first_trained_step(steps.trained),
                "skipped": state.skipped,
                "skipped_in_a_row": state.skipped_in_a_row,
            }
            return state, metrics

        def differentiate(shared, batch: Draw):
            """Loss and gradient, both means over the batch, and the rewards of every sample."""
            frozen, tree, steps = shared

            def objective(tree, batch: Draw):
                inputs, reward_inputs = chain_inputs(chain.generator, frozen.prompts, batch)
                adapter = setup.adaptation.bind(tree)
                samples = self._sample(chain, frozen.params, adapter, inputs, steps)
                copies = 1 + self.path.renoise
                reward_inputs = jax.tree.map(lambda x: jnp.repeat(x, copies, 0), reward_inputs)
                scores, parts = reward.score_with_parts(
                    frozen.reward_params, samples, reward_inputs
                )
                return jnp.sum(self.loss(scores)) / len(batch.indices), (scores, parts)

            value, rewards, gradient = accumulate_gradients(
                objective, tree, batch, num_microbatches
            )
            return (value, gradient), rewards

        return train_step

    def _sample(
        self, chain: Chain, params: Any, adapter: Adapter, inputs: Inputs, steps: StepDraw
    ) -> PyTree:
        if steps.stop is not None:
            return chain.sample_until(params, adapter, inputs, steps.trained, steps.stop)
        never_trained = self.path.never_trained(chain.num_steps)
        if self.path.renoise:
            return chain.sample_with_copies(
                params,
                adapter,
                inputs,
                steps.trained,
                self.path.renoise,
                never_trained=never_trained,
            )
        return chain.sample(params, adapter, inputs, steps.trained, never_trained=never_trained)

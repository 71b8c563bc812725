"""Algorithms that need no gradient of the reward: sample, score, and fit to the samples.

One step draws samples with the LoRA as it is, scores them, and makes several updates from them.
"""

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
from alignprop_jax.algorithms.batches import (
    Metrics,
    PromptTable,
    count_microbatches,
    draw_latents,
    reward_metrics,
)
from alignprop_jax.algorithms.optimizer import descend_if
from alignprop_jax.algorithms.prompt_order import prompt_indices
from alignprop_jax.algorithms.state import TrainState
from alignprop_jax.diffusion.sampling import Trajectory
from alignprop_jax.errors import UserError
from alignprop_jax.lora.factors import scale_lora
from alignprop_jax.rewards.base import Reward


@flax.struct.dataclass
class Rollouts:
    """Samples and what they are worth."""

    prompts: Int[Array, " b"]  # indices
    keys: Key[Array, " b"]
    latents: Float[Array, "b t+1 h w c"]  # see `sampling.Trajectory`
    log_probs: Float[Array, "b t"]
    advantages: Float[Array, " b"]  # see `PromptHistory.advantages`


@dataclasses.dataclass(frozen=True)
class Fit:
    """What an algorithm makes of its samples.

    Attributes:
        expand: `expand(rollouts, update) -> examples`, arrays of a leading axis b * n, the n
            examples of each sample one after the other; `update` counts the updates of a step.
        examples_per_sample: n.
        loss: `loss(params, prompts, lora, examples) -> (losses, extras)`, of each example its loss
            and scalars to report by name; `params` are the frozen ones, the LoRA has its scale
            folded in.
        weigh: turns the advantages of a whole batch into what `expand` finds as such.
    """

    expand: Callable[[Rollouts, Int[Array, ""]], PyTree]
    examples_per_sample: int
    loss: Callable[..., tuple[Float[Array, " e"], dict[str, Float[Array, " e"]]]]
    weigh: Callable[[Float[Array, " b"]], Float[Array, " b"]]


def make_rollout_step(
    sample: Callable[..., Trajectory],
    reward: Reward,
    fit: Fit,
    optimizer: optax.GradientTransformation,
    *,
    latent_shape: tuple[int, int, int],
    lora_scale: float,
    batch_size: int,
    microbatch_size: int,
    epochs: int,
    minibatches: int,
    split_batch: Callable[[Callable], Callable] = lambda function: function,
) -> Callable[[Any, Any, PromptTable, TrainState], tuple[TrainState, Metrics]]:
    """Builds one step; the arguments that `alignprop.make_train_step` has, too, are as there.

    Args:
        sample: the sampler, which keeps its latents.
        epochs: how many times every sample is used.
        minibatches: updates an epoch, each of a part of the samples.

    Returns:
        A pure function `train_step(params, reward_params, prompts, state) -> (state, metrics)`, to
        be jitted. The state's history is a `PromptHistory`. An update whose gradient is not finite
        is left out, and its step counted in the state.

        Metrics are those of AlignProp's step and the means of what `fit.loss` reports; `loss` and
        `grad_norm` are means over the updates, `start_step` is 0.

    Raises:
        UserError: the batch does not divide into minibatches, or these into microbatches.
    """
    if batch_size % minibatches:
        raise UserError(
            f"train.batch_size is {batch_size}; it must be a multiple of the number of minibatches,"
            f" {minibatches}"
        )
    sampled_at_a_time = count_microbatches(batch_size, microbatch_size)
    fitted_at_a_time = count_microbatches(
        batch_size // minibatches, min(microbatch_size, batch_size // minibatches)
    )

    def train_step(params, reward_params, prompts, state):
        order_key, noise_key = jax.random.split(state.key)
        images_key = jax.random.fold_in(noise_key, state.step)
        indices = prompt_indices(order_key, state.step, batch_size, prompts.num_prompts)
        image_keys = jax.random.split(images_key, batch_size)

        whole = (params, reward_params, prompts, state.lora)
        _, (latents, log_probs, scores, parts) = split_batch(draw)(whole, (indices, image_keys))
        history = state.history.add(indices, scores)
        advantages = fit.weigh(history.advantages(indices, scores))
        rollouts = Rollouts(indices, image_keys, latents, log_probs, advantages)
        by_minibatch = split_into(minibatches, rollouts)

        def update(carried, number):
            lora, opt_state = carried
            minibatch = jax.tree.map(lambda x: x[number % minibatches], by_minibatch)
            whole = (params, prompts, lora, number)
            (value, gradient), extras = split_batch(differentiate)(whole, minibatch)
            grad_norm = optax.tree.norm(gradient)
            finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
            carried = descend_if(finite, optimizer, gradient, lora, opt_state)
            return carried, {"loss": value, "grad_norm": grad_norm, **extras}

        carried, updates = jax.lax.scan(
            update, (state.lora, state.opt_state), jnp.arange(epochs * minibatches)
        )
        means = jax.tree.map(jnp.mean, updates)
        finite = jnp.isfinite(means["loss"]) & jnp.isfinite(means["grad_norm"])
        history = jax.tree.map(
            lambda new, old: jnp.where(jnp.isfinite(scores).all(), new, old), history, state.history
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

    def draw(whole, batch):
        params, reward_params, prompts, lora = whole

        def draw_microbatch(batch):
            indices, image_keys = batch
            latents, sampler_keys = draw_latents(image_keys, latent_shape)
            conditioning, inputs = prompts.rows(indices)
            trajectory = sample(
                params,
                scale_lora(lora, lora_scale),
                latents,
                conditioning,
                prompts.uncond,
                sampler_keys,
            )
            scored = reward.score_with_parts(reward_params, trajectory.images, inputs)
            return trajectory.latents, trajectory.log_probs, *scored

        return (), map_microbatches(draw_microbatch, batch, sampled_at_a_time)

    def differentiate(whole, rollouts):
        params, prompts, lora, number = whole

        def objective(lora, examples):
            losses, extras = fit.loss(params, prompts, scale_lora(lora, lora_scale), examples)
            return jnp.mean(losses), extras

        examples = fit.expand(rollouts, number)
        value, extras, gradient = accumulate_gradients(
            objective, lora, examples, fitted_at_a_time * fit.examples_per_sample
        )
        return (value, gradient), extras

    return train_step

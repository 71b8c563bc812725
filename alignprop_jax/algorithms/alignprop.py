"""AlignProp and its relatives: the reward's gradient, through decoder and sampler, to the LoRA."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from alignprop_jax.algorithms.accumulation import accumulate_gradients
from alignprop_jax.algorithms.batches import (
    Metrics,
    PromptTable,
    count_microbatches,
    draw_latents,
    reward_metrics,
)
from alignprop_jax.algorithms.losses import Loss
from alignprop_jax.algorithms.optimizer import descend_if
from alignprop_jax.algorithms.prompt_order import prompt_indices
from alignprop_jax.algorithms.state import TrainState
from alignprop_jax.diffusion.gradient_path import StepDraw
from alignprop_jax.diffusion.truncation import first_trained_step
from alignprop_jax.lora.factors import scale_lora
from alignprop_jax.rewards.base import Reward


def make_train_step(
    sample: Callable[..., Float[Array, "n*b h w 3"]],
    reward: Reward,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    draw_steps: Callable[[Key[Array, ""]], StepDraw],
    *,
    latent_shape: tuple[int, int, int],
    lora_scale: float,
    batch_size: int,
    microbatch_size: int = 0,
    split_batch: Callable[[Callable], Callable] = lambda function: function,
) -> Callable[[Any, Any, PromptTable, TrainState], tuple[TrainState, Metrics]]:
    """Builds one update of AlignProp (arXiv 2310.03739, algorithm 1) or of a relative of it.

    Args:
        sample: the differentiable sampler, from `sampling.make_sampler`. Where it gives n images
            for one of the latents, the loss is the sum of their losses.
        reward: what is raised; its weights are an argument of the step.
        loss: turns rewards into losses, from `losses.make_loss`.
        optimizer: of the LoRA factors.
        draw_steps: which sampler steps are run and trained, drawn once a step for the whole batch.
        latent_shape: height, width and channels of the latents.
        lora_scale: alpha / rank.
        batch_size: images a step.
        microbatch_size: images in memory at a time, a divisor of the batch size; 0 for all.
        split_batch: makes a function of a batch run on every device with its share of the batch,
            from `sharding.split_batch`; by default there is one device.

    Returns:
        A pure function `train_step(params, reward_params, prompts, state) -> (state, metrics)`, to
        be jitted. `params` holds the frozen "unet" and "vae", `reward_params` the reward's weights.
        A step whose loss or gradient is not finite leaves LoRA and optimizer as they are, and is
        counted in the state.

        Metrics are scalars: loss, reward_mean, reward_std (over all images), reward/NAME for the
        mean of each part of a sum of rewards, grad_norm (before clipping), start_step (the first
        step with gradient; the number of steps if there is none), skipped and skipped_in_a_row.

    Raises:
        UserError: when the microbatch size does not divide the batch size.
    """
    num_microbatches = count_microbatches(batch_size, microbatch_size)

    def train_step(params, reward_params, prompts, state):
        order_key, noise_key = jax.random.split(state.key)
        truncation_key, images_key = jax.random.split(jax.random.fold_in(noise_key, state.step))
        steps = draw_steps(truncation_key)
        indices = prompt_indices(order_key, state.step, batch_size, prompts.num_prompts)
        image_keys = jax.random.split(images_key, batch_size)

        whole = (params, reward_params, prompts, state.lora, steps)
        (value, gradient), (scores, parts) = split_batch(differentiate)(
            whole, (indices, image_keys)
        )
        grad_norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        state = state.after(
            finite, *descend_if(finite, optimizer, gradient, state.lora, state.opt_state)
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

    def differentiate(whole, batch):
        """Loss and gradient, both means over the batch, and the rewards of every image."""
        params, reward_params, prompts, lora, steps = whole

        def objective(lora, batch):
            indices, image_keys = batch
            latents, sampler_keys = draw_latents(image_keys, latent_shape)
            conditioning, inputs = prompts.rows(indices)
            images = sample(
                params,
                scale_lora(lora, lora_scale),
                latents,
                conditioning,
                prompts.uncond,
                sampler_keys,
                steps.trained,
                steps.stop,
            )
            inputs = jax.tree.map(lambda x: jnp.repeat(x, len(images) // len(latents), 0), inputs)
            scores, parts = reward.score_with_parts(reward_params, images, inputs)
            return jnp.sum(loss(scores)) / len(latents), (scores, parts)

        value, rewards, gradient = accumulate_gradients(objective, lora, batch, num_microbatches)
        return (value, gradient), rewards

    return train_step

"""The train step that a config describes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from alignprop_jax.algorithms.advantages import PromptHistory
from alignprop_jax.algorithms.alignprop import make_train_step
from alignprop_jax.algorithms.ddpo import make_ddpo_fit
from alignprop_jax.algorithms.losses import make_loss
from alignprop_jax.algorithms.optimizer import make_optimizer
from alignprop_jax.algorithms.presets import WITHOUT_REWARD_GRADIENT
from alignprop_jax.algorithms.rollouts import Fit, make_rollout_step
from alignprop_jax.algorithms.rwr import make_rwr_fit
from alignprop_jax.algorithms.state import TrainState, create_train_state
from alignprop_jax.config import gradient_path, lora_scale
from alignprop_jax.devices import sharding
from alignprop_jax.diffusion.sampling import make_denoiser
from alignprop_jax.experiment import TRAIN, Experiment, make_keys
from alignprop_jax.lora.factors import init_changes, init_lora


def build_train_step(config: ConfigDict, experiment: Experiment) -> Callable[..., Any]:
    """Builds one update, to be jitted; see `alignprop.make_train_step` for what it takes and gives.

    Raises:
        UserError: the images of an update do not divide among the devices.
    """
    settings = config.train
    common = {
        "latent_shape": experiment.sd.latent_shape,
        "lora_scale": lora_scale(config),
        "batch_size": settings.batch_size,
        "microbatch_size": settings.microbatch_size,
        "split_batch": sharding.split_batch(experiment.mesh),
    }
    key = "microbatch_size" if settings.microbatch_size else "batch_size"
    sharding.check_batch_size(f"train.{key}", settings[key], experiment.mesh)
    if config.algorithm in WITHOUT_REWARD_GRADIENT:
        rollouts = config.rollouts
        together = settings.batch_size // rollouts.minibatches
        sharding.check_batch_size(
            "train.batch_size / config.rollouts.minibatches", together, experiment.mesh
        )
        return make_rollout_step(
            functools.partial(experiment.sample, keep_latents=True),
            experiment.reward,
            _fit(config, experiment),
            optimizer_of(config),
            epochs=rollouts.epochs,
            minibatches=rollouts.minibatches,
            **common,
        )
    path = gradient_path(config)
    return make_train_step(
        functools.partial(
            experiment.sample,
            renoise=path.renoise,
            never_trained=path.never_trained(config.sampler.num_steps),
        ),
        experiment.reward,
        make_loss(config.loss.shape, config.loss.target, config.loss.scale),
        optimizer_of(config),
        functools.partial(path.draw, num_steps=config.sampler.num_steps),
        **common,
    )


def create_state(config: ConfigDict, experiment: Experiment) -> TrainState:
    """Returns the state before the first step of a fresh LoRA, on every device."""
    keys, settings, weights = make_keys(config.train.seed), config.lora, experiment.params["unet"]
    if settings.rank:
        lora = init_lora(keys.lora, weights, settings.rank, settings.targets)
    else:
        lora = init_changes(weights)
    num_prompts = len(experiment.splits[TRAIN].prompts)
    history = create_history(config, num_prompts)
    state = create_train_state(lora, optimizer_of(config), keys.train, history)
    return sharding.put(state, sharding.replicated(experiment.mesh))


def frozen_arguments(experiment: Experiment) -> tuple[Any, ...]:
    """What the train step takes before the state, and leaves as it is."""
    return experiment.params, experiment.reward.params, experiment.splits[TRAIN].table


def trace_train_step(
    config: ConfigDict, experiment: Experiment, state: TrainState
) -> jax.stages.Traced:
    """Traces the train step, as it lies on the devices; its memory for the state is used again.

    Raises:
        UserError: the images of an update do not divide among the devices.
    """
    everywhere = sharding.replicated(experiment.mesh)
    step = build_train_step(config, experiment)
    jitted = jax.jit(step, donate_argnums=3, out_shardings=everywhere)
    return jitted.trace(*frozen_arguments(experiment), state)


def _fit(config: ConfigDict, experiment: Experiment) -> Fit:
    sd, sampler, remat = experiment.sd, config.sampler, experiment.remat
    if config.algorithm == "rwr":
        denoise = make_denoiser(sd, 1.0, remat)
        return make_rwr_fit(denoise, sd.scheduler, config.rwr.temperature)
    return make_ddpo_fit(
        make_denoiser(sd, sampler.guidance_scale, remat, share=False),
        sd.scheduler,
        sampler.num_steps,
        sampler.eta,
        sampler.guidance_scale,
        **config.ddpo,
    )


def create_history(config: ConfigDict, num_prompts: int) -> PromptHistory | None:
    """What the algorithm remembers before the first step; None for one that forgets."""
    if config.algorithm not in WITHOUT_REWARD_GRADIENT:
        return None
    return PromptHistory.create(num_prompts, config.rollouts.history)


def optimizer_of(config: ConfigDict) -> optax.GradientTransformation:
    """Returns the optimizer that the config describes."""
    settings = config.train
    return make_optimizer(
        settings.learning_rate,
        weight_decay=settings.weight_decay,
        beta1=settings.beta1,
        beta2=settings.beta2,
        epsilon=settings.epsilon,
        max_grad_norm=settings.max_grad_norm,
    )

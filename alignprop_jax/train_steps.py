"""The train step that a config describes."""

import jax
from ml_collections import ConfigDict

from alignprop_jax.algorithms.base import Frozen, Setup, TrainStep
from alignprop_jax.algorithms.state import TrainState, create_train_state
from alignprop_jax.devices import sharding
from alignprop_jax.experiment import TRAIN, Experiment, make_keys
from alignprop_jax.settings import adaptation_of, optimizer_of


def build_train_step(config: ConfigDict, experiment: Experiment) -> TrainStep:
    """Builds one update, to be jitted; see `Algorithm.make_step`.

    Raises:
        UserError: the images of an update do not divide among the devices.
    """
    settings, mesh = config.train, experiment.mesh
    key = "microbatch_size" if settings.microbatch_size else "batch_size"
    sharding.check_batch_size(f"train.{key}", settings[key], mesh)
    experiment.algorithm.check_batch(settings.batch_size, mesh.size)
    setup = Setup(
        experiment.chain,
        experiment.reward,
        adaptation_of(config),
        optimizer_of(config),
        settings.batch_size,
        settings.microbatch_size,
        sharding.split_batch(mesh),
    )
    return experiment.algorithm.make_step(setup)


def create_state(config: ConfigDict, experiment: Experiment) -> TrainState:
    """Returns the state before the first step of a fresh LoRA, on every device."""
    keys = make_keys(config.train.seed)
    tree = adaptation_of(config).init(keys.lora, experiment.weights)
    history = experiment.algorithm.start_history(len(experiment.splits[TRAIN].prompts))
    state = create_train_state(tree, optimizer_of(config), keys.train, history)
    return sharding.put(state, sharding.replicated(experiment.mesh))


def frozen_of(experiment: Experiment) -> Frozen:
    """What the train step takes before the state, and leaves as it is."""
    table = experiment.splits[TRAIN].table
    return Frozen(experiment.params, experiment.reward.params, table)


def trace_train_step(
    config: ConfigDict, experiment: Experiment, state: TrainState
) -> jax.stages.Traced:
    """Traces the train step, as it lies on the devices; its memory for the state is used again.

    Raises:
        UserError: the images of an update do not divide among the devices.
    """
    everywhere = sharding.replicated(experiment.mesh)
    step = build_train_step(config, experiment)
    jitted = jax.jit(step, donate_argnames="state", out_shardings=everywhere)
    return jitted.trace(frozen_of(experiment), state)

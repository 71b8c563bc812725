"""The train step that a config describes."""

import functools
import time
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from alignprop_jax.algorithms.base import Frozen, Setup, TrainStep
from alignprop_jax.algorithms.state import TrainState, create_train_state
from alignprop_jax.devices import sharding
from alignprop_jax.devices.compilation import (
    compiler_options,
    garbage_collection_paused,
    release_freed_memory,
)
from alignprop_jax.runs.experiment import TRAIN, Experiment, make_keys
from alignprop_jax.runs.settings import adaptation_of, optimizer_of

CompiledStep = Callable[[TrainState], tuple[TrainState, dict[str, jax.Array]]]


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


def compile_train_step(
    config: ConfigDict, experiment: Experiment, state: TrainState
) -> tuple[CompiledStep, float]:
    """Compiles one update; returns it with the seconds that took."""
    print("compiling the train step ...", end=" ", flush=True)
    began = time.perf_counter()
    with garbage_collection_paused():
        lowered = trace_train_step(config, experiment, state).lower()
    compiled = lowered.compile(compiler_options())
    release_freed_memory()
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s", flush=True)
    return functools.partial(compiled, frozen_of(experiment)), seconds

"""One train step of the nano run on meshes of several sizes, for `test_sharding`.

    python -m tests.steps_on_meshes CONFIG OUTPUT ALGORITHM DEVICES_FSDP ...

A program of its own: the number of devices is decided when JAX starts.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from alignprop_jax.algorithms.presets import use_algorithm
from alignprop_jax.config import load_config
from alignprop_jax.devices import sharding
from alignprop_jax.devices.cpu_devices import use_cores
from alignprop_jax.runs.experiment import load_experiment
from alignprop_jax.runs.settings import at_a_time
from alignprop_jax.runs.train_step import compile_train_step, create_state


def main(config_file: str, output: Path, algorithm: str, meshes: Sequence[str]) -> None:
    """Writes the factors, MESH.npy, scalars, MESH.json, and the program, MESH.hlo.

    Args:
        config_file: of the nano run.
        output: a folder.
        algorithm: its name in a config.
        meshes: DEVICES_FSDP, such as 8_2.
    """
    config = load_config(config_file)
    use_algorithm(config, algorithm)
    use_cores(*at_a_time(config))
    config.train.batch_size = 16
    config.train.microbatch_size = 8
    config.sampler.eta = 1.0
    config.truncation.strategy = "full"
    # A clipped importance weight has no gradient, and rounding may clip it.
    config.ddpo.clip_range = 1.0
    # AdamW's step is the gradient itself, so that the factors show it.
    config.train.update({"learning_rate": 1.0, "epsilon": 1.0, "max_grad_norm": 1e6})
    for name in meshes:
        devices, fsdp = (int(number) for number in name.split("_"))
        mesh = sharding.make_mesh(fsdp, jax.devices()[:devices])
        experiment = load_experiment(config, mesh)
        state = create_state(config, experiment)
        # The factors begin with up = 0, where down has no gradient.
        moved = jax.tree.map(lambda x: x + 0.1, state.lora)
        state = state.replace(lora=sharding.put(moved, sharding.replicated(mesh)))
        size = {"lora_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.lora))}
        weights = jax.tree.leaves(experiment.params)
        size["weight_bytes"] = sum(leaf.addressable_shards[0].data.nbytes for leaf in weights)
        step, _ = compile_train_step(config, experiment, state)
        (output / f"{name}.hlo").write_text(step.func.as_text())
        state, metrics = step(state)
        leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(state.lora)]
        scalars = {key: float(value) for key, value in metrics.items()}
        (output / f"{name}.json").write_text(json.dumps(scalars | size))
        np.save(output / f"{name}.npy", np.concatenate(leaves))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4:])

"""One train step, compiled for a TPU slice, and what it costs there."""

import dataclasses
import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from alignprop_jax.devices import sharding
from alignprop_jax.loading.shapes_only import shapes_only
from alignprop_jax.planning.arithmetic import Arithmetic, count
from alignprop_jax.planning.compiler import Compiled, compile_layout, compile_whole, dump_to
from alignprop_jax.planning.hlo_cycles import ProgramCost, program_cost
from alignprop_jax.planning.topology import Topology
from alignprop_jax.runs.experiment import Experiment, load_experiment
from alignprop_jax.runs.train_step import create_state, frozen_of, trace_train_step


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the compiler says of a train step.

    Attributes:
        topology: where it is to run.
        images_per_chip: that are in memory at a time.
        images_per_step: of all chips.
        memory: bytes of a chip, by what they hold; "program" only where its code was written.
        fits: whether a chip has as many.
        arithmetic: of a chip, of the mean step.
        cost: of a chip, of the mean step; None where it does not fit. Without cycles where the
            program's code was not written.
        compile_seconds: on this machine.
    """

    topology: Topology
    images_per_chip: int
    images_per_step: int
    memory: dict[str, int]
    fits: bool
    arithmetic: Arithmetic
    cost: ProgramCost | None
    compile_seconds: float

    @property
    def seconds(self) -> dict[str, float]:
        """Of a mean step, by what takes them; none overlaps with another. Empty where unknown."""
        if self.cost is None or not self.cost.cycles:
            return {}
        chip, arithmetic = self.topology.chip, self.arithmetic
        return {
            "compiler_estimate": self.cost.cycles.total() / chip.clock,
            "kernels_by_roofline": max(
                arithmetic.kernel_flops / chip.peak_flops,
                arithmetic.kernel_bytes / chip.hbm_bandwidth,
            ),
            "collectives": self.cost.collective_bytes.total() / chip.ici_bandwidth,
        }

    @property
    def share_of_peak(self) -> float:
        """Of the chip's floating-point operations a second in bfloat16."""
        return self.arithmetic.flops / (sum(self.seconds.values()) * self.topology.chip.peak_flops)


def estimate(config: ConfigDict, topology: Topology) -> Estimate:
    """Compiles the train step of a validated config, whose weights are not read.

    Raises:
        UserError: the config's models or files cannot be found, it does not divide among the chips,
            or the TPU's compiler is not installed.
    """
    return _estimate(config, topology, _load(config, topology), compile_whole)


def estimate_memory(config: ConfigDict, topology: Topology) -> Estimate:
    """As `estimate`, without the size of the program and how long it takes; in a tenth of the time.

    It is done in a process of its own, which is ended where the compiler would go on.

    Raises:
        UserError: as `estimate`.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as dump:
        receiver, sender = context.Pipe(duplex=False)
        arguments = (config, config.reward, topology, Path(dump), sender)
        process = context.Process(target=_send_memory, args=arguments, daemon=True)
        process.start()
        sender.close()
        try:
            result = receiver.recv()
        except EOFError as error:
            process.join()
            raise RuntimeError(
                f"the TPU's compiler ended with exit code {process.exitcode}"
            ) from error
        finally:
            process.kill()
            process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _send_memory(
    config: ConfigDict, reward: Any, topology: Topology, dump: Path, sender: Connection
) -> None:
    config.reward = reward  # Pickled inside a config, a dict of weights becomes a config, too.
    dump_to(dump)
    try:
        experiment = _load(config, topology)
        compile_ = functools.partial(compile_layout, dump=dump)
        sender.send(_estimate(config, topology, experiment, compile_))
    except Exception as error:
        sender.send(error)
    sender.close()
    os._exit(0)  # The compiler is still at it.


def _load(config: ConfigDict, topology: Topology) -> Experiment:
    mesh = sharding.make_mesh(config.mesh.fsdp, topology.devices())
    with shapes_only():
        return load_experiment(config, mesh)


def _estimate(
    config: ConfigDict,
    topology: Topology,
    experiment: Experiment,
    compile_: Callable[[jax.stages.Traced], Compiled],
) -> Estimate:
    mesh = experiment.mesh
    with shapes_only():
        state = create_state(config, experiment)
        traced = trace_train_step(config, experiment, state)
    frozen = frozen_of(experiment)
    share_of = make_share(experiment)
    began = time.perf_counter()
    memory = {
        **{name: bytes_a_device(weights) for name, weights in frozen.params.items()},
        "reward": bytes_a_device(frozen.reward_params),
        "prompts": bytes_a_device(frozen.prompts),
        "lora_and_optimizer": bytes_a_device(state),
    }
    compiled = compile_(traced)
    found = dict(compiled.memory)
    if "all" in found:
        found["temporaries"] = found.pop("all") - sum(memory.values())
    memory |= found
    settings = config.train
    return Estimate(
        topology,
        (settings.microbatch_size or settings.batch_size) // mesh.size,
        settings.batch_size,
        memory,
        compiled.text is not None,
        count(traced.jaxpr, share_of, mesh.size, topology.chip.matrix_unit),
        compiled.text and program_cost(compiled.text, share_of),
        time.perf_counter() - began,
    )


def bytes_a_device(tree: Any) -> int:
    """Of arrays or shapes with shardings, what each device holds."""

    def size(leaf) -> int:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf).update(sharding=leaf.sharding)
        return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def make_share(experiment: Experiment) -> Callable[[str], float]:
    """Returns from a conditional's name to how often the costlier branch is run, in the mean.

    The conditionals are the gates of denoising steps: in the backward pass, whether a step is
    trained; in the forward pass, whether it is run at all.
    """
    trained, run = experiment.algorithm.open_gates(experiment.chain.num_steps)
    return lambda name: trained if "transpose" in name else run

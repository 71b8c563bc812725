"""What is kept of the denoising steps for the backward pass, chosen by the memory there is."""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from alignprop_jax.core.generator import Generator, Weights
from alignprop_jax.core.jaxprs import inner_jaxprs
from alignprop_jax.nn import saved_names

# Of a device's memory, what activations may take.
_SHARE = 0.5
# To store a step takes a third to a quarter of the time that its trained steps save.
_LEAST_TRAINED = 0.3
# All activations of the networks here are so many times those that "partial" keeps.
_ALL_ACTIVATIONS = 8


def choose_remat(bytes_kept: float, num_kept: int, trained_steps: float, memory: int | None) -> str:
    """The fastest of `sampling.REMAT_POLICIES` that a device has room for.

    Args:
        bytes_kept: of one step by "partial", of all images that a device has in memory.
        num_kept: steps of a sample of which something is kept, trained or not.
        trained_steps: of them, in the mean.
        memory: bytes of a device; None where nobody knows.

    Returns:
        "partial" where half of the memory holds what it keeps of all these steps, and where enough
        of them are trained for that to pay; else "step" where it holds all activations of one;
        else "block".
    """
    if memory is None:
        return "block"
    if trained_steps >= _LEAST_TRAINED * num_kept and bytes_kept * num_kept <= _SHARE * memory:
        return "partial"
    return "step" if bytes_kept * _ALL_ACTIVATIONS <= _SHARE * memory else "block"


def bytes_kept_of(generator: Generator, weights: Weights, prompt: PyTree) -> int:
    """What "partial" keeps of one sample and prompt at one step.

    Args:
        generator: on one device, see `Generator.on_one_device`.
        weights: of its network, or their shapes.
        prompt: a single one, encoded.
    """

    def evaluate(weights, prompt):
        state = jax.tree.map(lambda x: x[None], generator.start(jax.random.key(0)))
        at = jax.tree.map(lambda x: jnp.asarray(x[0]), generator.schedule(1))
        return generator.predict(weights, None, state, at, prompt)

    return _bytes_of_names(jax.make_jaxpr(evaluate)(weights, prompt).jaxpr)


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that each device of a mesh has, those of a CPU equal shares; None where unknown."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # A device to compile for, which is not there.
        return None


def _bytes_of_names(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name" and eqn.params["name"] in saved_names.ALL:
            total += sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in eqn.outvars)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(map(_bytes_of_names, inner_jaxprs(eqn)))
    return total

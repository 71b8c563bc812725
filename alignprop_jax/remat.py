"""What is kept of the denoising steps for the backward pass, chosen by the memory there is."""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignprop_jax.jaxprs import inner_jaxprs
from alignprop_jax.models import attention_functions, convolution
from alignprop_jax.stable_diffusion import Conditioning, StableDiffusion, apply_unet

_SAVED_NAMES = (attention_functions.SAVED_NAME, convolution.SAVED_NAME)
# Of a device's memory, what activations may take.
_SHARE = 0.5
# All activations of the networks here are so many times those that "partial" keeps.
_ALL_ACTIVATIONS = 8


def choose_remat(
    sd: StableDiffusion,
    params: Any,
    conditioning: Conditioning,
    num_images: float,
    num_steps: int,
    memory: int | None,
) -> str:
    """The fastest of `sampling.REMAT_POLICIES` that a device has room for.

    Args:
        params: of the UNet, or their shapes.
        conditioning: of one prompt.
        num_images: of a device that are in memory at a time, twice as many with guidance.
        num_steps: of a sample.
        memory: bytes of a device; None where nobody knows.

    Returns:
        "partial" where the outputs of all steps fit; else "step" where all activations of one do;
        else "block".
    """
    if memory is None:
        return "block"

    def of_one(params, latents, conditioning):
        return apply_unet(sd, {"params": params}, latents, jnp.int32(0), conditioning)

    latents = jax.ShapeDtypeStruct((1, *sd.latent_shape), jnp.float32)
    a_step = num_images * _saved_bytes(jax.make_jaxpr(of_one)(params, latents, conditioning).jaxpr)
    room = _SHARE * memory
    if a_step * num_steps <= room:
        return "partial"
    return "step" if a_step * _ALL_ACTIVATIONS <= room else "block"


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that each device of a mesh has, those of a CPU equal shares; None where unknown."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # A device to compile for, which is not there.
        return None


def _saved_bytes(jaxpr: Any) -> int:
    """Of all that `checkpoint_name` gives one of the names that "partial" keeps."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name" and eqn.params["name"] in _SAVED_NAMES:
            total += sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in eqn.outvars)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(map(_saved_bytes, inner_jaxprs(eqn)))
    return total

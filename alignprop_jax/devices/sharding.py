"""The mesh of devices, and how arrays and computations lie on it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alignprop_jax.errors import UserError
from alignprop_jax.loading import shapes_only
from alignprop_jax.nn.attention_functions import (
    Attend,
    attend,
    attend_by_kernel,
    attend_in_blocks,
)
from alignprop_jax.nn.stacked_layers import is_stacked
from alignprop_jax.nn.tiled_attention import attend_in_tiles

# Generations without the instructions of the attention kernel.
_WITHOUT_KERNEL = ("TPU v2", "TPU v3")
# Of a chip's own memory, what the kernel may take: all there is on v4, half or more on others.
_VMEM_BYTES, _VMEM_BYTES_OF_V4 = 64 * 2**20, 16 * 2**20
DATA_AXES = ("data", "fsdp")
ATTENTION = {
    "plain": attend,
    "blocks": attend_in_blocks,
    "tiles": attend_in_tiles,
    "kernel": attend_by_kernel,
}
# Those that XLA cannot divide among devices.
_BY_DEVICE = ("tiles", "kernel")


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh data x fsdp; every device takes its share of the batch.

    Args:
        fsdp: over how many devices the frozen weights are split; 1 for a copy on each.
        devices: those to use; None for all, on all hosts.

    Raises:
        UserError: the devices do not divide into groups of `fsdp`.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % fsdp:
        raise UserError(
            f"config.mesh.fsdp={fsdp} must divide the number of devices, {len(devices)}"
        )
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, DATA_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXES))


def of_frozen(weights: Any, mesh: Mesh) -> Any:
    """Shardings of frozen weights: a kernel is split over `fsdp`, on its longest axis that can be.

    A device gathers a kernel when it gets to its layer. Biases and norms, which are small, lie on
    every device.
    """
    size = mesh.shape["fsdp"]

    def sharding(path, leaf) -> NamedSharding:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        first = int(is_stacked(names))
        axes = [axis for axis in range(first, leaf.ndim) if leaf.shape[axis] % size == 0]
        if size == 1 or leaf.ndim < first + 2 or not axes:
            return replicated(mesh)
        split: list[str | None] = [None] * leaf.ndim
        split[max(axes, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*split))

    return jax.tree_util.tree_map_with_path(sharding, weights)


def put(tree: Any, shardings: Any) -> Any:
    """Lays out arrays of the host, which have to be the same on every host, over devices.

    Args:
        tree: of arrays, typed keys too.
        shardings: one for all, or a tree of them.

    Returns:
        The same arrays, or where shapes stand for weights (see `loading.shapes_only`) shapes.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    if shapes_only.active():
        return jax.tree.map(_placed_shape, tree, shardings)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    # device_put would compare the arrays of all hosts, and send every weight to each for that.
    def place(x, sharding):
        if getattr(x, "sharding", None) == sharding:
            return x
        is_key = isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        local = x if is_key else np.asarray(x)
        return jax.make_array_from_callback(local.shape, sharding, lambda index: local[index])

    return jax.tree.map(place, tree, shardings)


def _placed_shape(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    x = x if hasattr(x, "dtype") else np.asarray(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def gather(tree: Any) -> Any:
    """Returns arrays that lie on the mesh as numpy arrays, whole and on every host."""
    return multihost_utils.process_allgather(tree, tiled=True)


def split_batch(mesh: Mesh) -> Callable[[Callable], Callable]:
    """Returns what makes a function of a batch run on every device with its share of the batch.

    The function is `function(whole, batch) -> (means, rows)`: `whole` are arrays that do not belong
    to an image, `batch` and `rows` have the images as their leading axis, and `means` are means
    over them. Devices exchange nothing but the means, and these once, when the function has
    returned: left to itself, XLA would add up a gradient over devices in each turn of a loop.
    With fsdp it is left to itself: it has to gather weights in each turn, which are much larger.
    """

    def split(function: Callable) -> Callable:
        def on_share(whole, batch):
            means, rows = function(whole, batch)
            return jax.lax.pmean(means, DATA_AXES), rows

        def on_all(whole, batch):
            return function(whole, jax.lax.with_sharding_constraint(batch, over_batch(mesh)))

        if mesh.shape["fsdp"] > 1:
            return on_all
        whole, images = PartitionSpec(), PartitionSpec(DATA_AXES)
        return jax.shard_map(
            on_share,
            mesh=mesh,
            in_specs=(whole, images),
            out_specs=(whole, images),
            # Rewards are anybody's code, and need not say which of their constants vary.
            check_vma=False,
        )

    return split


def check_batch_size(key: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless every device gets the same number of images."""
    if batch_size % mesh.size:
        raise UserError(
            f"config.{key}={batch_size} must be a multiple of the number of devices, {mesh.size}"
        )


def choose_attention(name: str, mesh: Mesh) -> Attend:
    """How the networks attend, by a name of `ATTENTION` or "auto", the best for the devices.

    Raises:
        UserError: the kernel is asked for where it cannot run.
    """
    device = mesh.devices.flat[0]
    runs_kernel = device.platform == "tpu" and device.device_kind not in _WITHOUT_KERNEL
    if name == "auto":
        name = "kernel" if runs_kernel else "tiles" if device.platform == "cpu" else "blocks"
    if name == "kernel" and not runs_kernel:
        raise UserError(
            f"config.attention=kernel is for TPUs from v4 on, not for {device.device_kind}; take "
            "blocks, or auto, here"
        )
    chosen = ATTENTION[name]
    if name == "kernel":
        vmem_bytes = _VMEM_BYTES_OF_V4 if device.device_kind == "TPU v4" else _VMEM_BYTES
        chosen = functools.partial(chosen, vmem_bytes=vmem_bytes)
    return on_each_device(chosen, mesh) if name in _BY_DEVICE else chosen


def on_each_device(attend: Attend, mesh: Mesh) -> Attend:
    """Attention that each device computes for its own images.

    XLA cannot divide a kernel's work, nor a loop's over the heads of all images.
    """
    images = PartitionSpec(DATA_AXES)
    split = jax.shard_map(attend, mesh=mesh, in_specs=images, out_specs=images, check_vma=False)

    def attend_to_own(query, key, value):
        already_split = jax.sharding.get_abstract_mesh().manual_axes
        return (attend if already_split else split)(query, key, value)

    return attend_to_own

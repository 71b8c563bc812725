"""The mesh of devices, and how arrays lie on it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alignprop_jax.errors import UserError

DATA_AXES = ("data", "fsdp")


def make_mesh() -> Mesh:
    """Returns the mesh of all devices, data x fsdp; every device takes its share of the batch."""
    return jax.make_mesh((jax.device_count(), 1), DATA_AXES, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXES))


def check_batch_size(key: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless every device gets the same number of images."""
    if batch_size % mesh.size:
        raise UserError(
            f"config.{key}={batch_size} must be a multiple of the number of devices, {mesh.size}"
        )

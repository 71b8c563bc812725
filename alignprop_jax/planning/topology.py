"""TPU slices by name, and their devices as the compiler knows them."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax

from alignprop_jax.errors import UserError
from alignprop_jax.planning.chips import CHIPS, Chip

# Other names of the generations, as in the names of accelerator types.
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}
# Otherwise the compiler asks the cloud's metadata server what machine this is, which only a machine
# of the cloud has, complains, and takes the chips of this machine, if it has any, for itself.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Shapes of the slices of two-dimensional generations, by their number of chips.
_SHAPES_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)}
_SHAPES_2D[256] = (16, 16)
# ... of three-dimensional ones, as cube-like as cloud.google.com/tpu/docs lists them.
_SHAPES_3D = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4)}
_SHAPES_3D |= {128: (4, 4, 8), 256: (4, 8, 8), 512: (8, 8, 8)}
# More than any slice has; a compiler for more would take all memory.
_MOST_CHIPS = 16_384


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: a kind of chip and how many of them along each axis."""

    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> "Topology":
        """Reads GENERATION:AxB[xC], such as v5e:4x4, or an accelerator type, such as v5litepod-16.

        Raises:
            UserError: it is neither, or there is no such slice.
        """
        number = "[1-9][0-9]{0,4}"
        match = re.fullmatch(rf"(\w+)(?::({number}(?:x{number})*)|-({number}))", name)
        chip = CHIPS.get(_ALIASES.get(match[1], match[1])) if match else None
        if chip is None:
            raise UserError(
                f"topology {name!r} is none: give one of {', '.join(CHIPS)} with its shape in "
                "chips, v5e:4x4 or v4:2x2x1, or an accelerator type, v5litepod-16 or v4-8"
            )
        if match[2]:
            shape = tuple(map(int, match[2].split("x")))
            if len(shape) != chip.dimensions:
                example = "x".join(map(str, chip.one_host))
                raise UserError(
                    f"topology {name!r}: slices of {chip.name} have {chip.dimensions} dimensions, "
                    f"such as {chip.name}:{example}"
                )
            if math.prod(shape) > _MOST_CHIPS:
                raise UserError(f"topology {name!r}: no slice has over {_MOST_CHIPS} chips")
            return cls(chip, shape)
        shapes = _SHAPES_2D if chip.dimensions == 2 else _SHAPES_3D
        chips = int(match[3]) / chip.cores_in_name
        if chips not in shapes:
            names = ", ".join(f"{match[1]}-{known * chip.cores_in_name}" for known in shapes)
            raise UserError(f"topology {name!r} is none; there are {names}, or give the shape")
        return cls(chip, shapes[int(chips)])

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> Sequence[jax.Device]:
        """The devices, one a chip, to compile for; they cannot compute.

        Raises:
            UserError: the TPU's compiler is not installed, or knows no such slice.
        """
        from jax.experimental import topologies

        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                "the TPU's compiler is not installed; it needs no TPU: pip install libtpu"
            )
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        host = tuple(map(min, self.shape, self.chip.one_host))
        options = {"chips_per_host_bounds": (*host, *(1,) * (3 - len(host)))}
        if self.chip.cores_in_name > 1:
            options["chip_config_name"] = "megacore"
        try:
            topology = topologies.get_topology_desc(
                platform="tpu", topology_name=str(self), **options
            )
        except Exception as error:
            raise UserError(f"topology {self}: {str(error).splitlines()[0]}") from error
        return topology.devices

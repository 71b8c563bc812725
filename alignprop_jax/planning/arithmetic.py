"""Floating-point operations of a traced program: of its products, which are all but all of them.

The compiler's own count takes a loop's body once and leaves custom kernels out.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend import core

from alignprop_jax.core.jaxprs import inner_jaxprs


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What one device does in one run; of a program of many devices, with a device's share.

    Attributes:
        flops: multiplications and additions of all products, those of kernels included.
        kernel_flops: of custom kernels, with every product's widths rounded up to those of the
            chip's matrix units.
        kernel_bytes: that custom kernels read and write.
    """

    flops: float = 0.0
    kernel_flops: float = 0.0
    kernel_bytes: float = 0.0

    def __add__(self, other: "Arithmetic") -> "Arithmetic":
        return Arithmetic(
            self.flops + other.flops,
            self.kernel_flops + other.kernel_flops,
            self.kernel_bytes + other.kernel_bytes,
        )

    def __mul__(self, times: float) -> "Arithmetic":
        return Arithmetic(self.flops * times, self.kernel_flops * times, self.kernel_bytes * times)


def count(
    jaxpr: Any,
    share_of: Callable[[str], float],
    devices: int = 1,
    matrix_unit: int = 128,
) -> Arithmetic:
    """Counts the products of a traced program.

    Args:
        jaxpr: of it.
        share_of: from a conditional's place in the program to how often the costlier of its
            branches is run.
        devices: among which the program is divided by the compiler, evenly; what it divides itself,
            by `shard_map`, is counted as it is.
        matrix_unit: rows and columns of the chip's matrix units.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = Arithmetic()
    for eqn in _live_equations(jaxpr):
        total += _count_equation(eqn, share_of, devices, matrix_unit)
    return total


def _live_equations(jaxpr: Any) -> Iterator[Any]:
    """Those that something depends on: the compiler leaves the others out, JAX not always."""
    needed = set(_variables(jaxpr.outvars))
    for eqn in reversed(jaxpr.eqns):
        # Effects are a kernel's writing to memory, which is the purpose of all that is in it.
        writes = eqn.effects and eqn.primitive.name != "pallas_call"
        if writes or not needed.isdisjoint(_variables(eqn.outvars)):
            needed.update(_variables(eqn.invars))
            yield eqn


def _variables(atoms: Sequence[Any]) -> Iterator[Any]:
    return (atom for atom in atoms if not isinstance(atom, core.Literal))


def _count_equation(
    eqn: Any, share_of: Callable[[str], float], devices: int, matrix_unit: int
) -> Arithmetic:
    params = eqn.params
    place = str(eqn.source_info.name_stack)

    def share_within(inner_place: str) -> float:
        return share_of(f"{place}/{inner_place}")

    match eqn.primitive.name:
        case "dot_general":
            flops = 2 * math.prod(_product_sizes(eqn)) / devices
            return Arithmetic(flops)
        case "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            out_channels = kernel[params["dimension_numbers"].rhs_spec[0]]
            flops = 2 * _size(eqn.outvars[0]) * math.prod(kernel) / out_channels
            # Zeros that dilate the input of a strided convolution's gradient are not computed with.
            return Arithmetic(flops / math.prod(params["lhs_dilation"]) / devices)
        case "scan":
            return count(params["jaxpr"], share_within, devices, matrix_unit) * params["length"]
        case "cond" if params.get("branches_platforms"):
            # The last is that of all platforms that have none of their own, such as TPUs.
            return count(params["branches"][-1], share_within, devices, matrix_unit)
        case "cond":
            branches = [
                count(branch, share_within, devices, matrix_unit) for branch in params["branches"]
            ]
            branches.sort(key=lambda branch: branch.flops)
            share = share_of(place)
            return branches[-1] * share + branches[0] * (1 - share)
        case "shard_map":
            return count(params["jaxpr"], share_within, matrix_unit=matrix_unit)
        case "pallas_call":
            runs = math.prod(params["grid_mapping"].grid)
            inside = count(params["jaxpr"], share_within, devices).flops * runs
            padded = _padded_flops(params["jaxpr"], matrix_unit) * runs / devices
            arrays = (*eqn.invars, *eqn.outvars)
            moved = sum(_size(array) * array.aval.dtype.itemsize for array in arrays) / devices
            return Arithmetic(inside, padded, moved)
        case _:
            total = Arithmetic()
            for inner in inner_jaxprs(eqn):
                total += count(inner, share_within, devices, matrix_unit)
            return total


def _product_sizes(eqn: Any) -> tuple[int, int, int, int]:
    """Of a product: how many there are, and the rows, the depth and the columns of each."""
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    lhs, rhs = (variable.aval.shape for variable in eqn.invars)
    number = math.prod(lhs[axis] for axis in batch)
    depth = math.prod(lhs[axis] for axis in left)
    rows, columns = math.prod(lhs) // depth // number, math.prod(rhs) // depth // number
    return number, rows, depth, columns


def _padded_flops(jaxpr: Any, matrix_unit: int) -> float:
    """Of a kernel's products, rows apart, each size rounded up to what a matrix unit takes."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            number, rows, *widths = _product_sizes(eqn)
            total += (
                2 * number * rows * math.prod(-(-n // matrix_unit) * matrix_unit for n in widths)
            )
        total += sum(_padded_flops(inner, matrix_unit) for inner in inner_jaxprs(eqn))
    return total


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)

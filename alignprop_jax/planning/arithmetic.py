"""Floating-point operations of a traced program: of its products, which are all but all of them.

The compiler's own count takes a loop's body once and leaves custom kernels out.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What one device does in one run; of a program of many devices, with a device's share.

    Attributes:
        flops: multiplications and additions of all products, those of kernels included.
        kernel_flops: of custom kernels.
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


def count(jaxpr: Any, share_of: Callable[[str], float], devices: int = 1) -> Arithmetic:
    """Counts the products of a traced program.

    Args:
        jaxpr: of it.
        share_of: from a conditional's place in the program to how often the costlier of its
            branches is run.
        devices: among which the program is divided by the compiler, evenly; what it divides itself,
            by `shard_map`, is counted as it is.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = Arithmetic()
    for eqn in jaxpr.eqns:
        total += _count_equation(eqn, share_of, devices)
    return total


def _count_equation(eqn: Any, share_of: Callable[[str], float], devices: int) -> Arithmetic:
    params = eqn.params
    place = str(eqn.source_info.name_stack)

    def share_within(inner_place: str) -> float:
        return share_of(f"{place}/{inner_place}")

    match eqn.primitive.name:
        case "dot_general":
            ((contracted, _), _) = params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            depth = math.prod(lhs[axis] for axis in contracted)
            return Arithmetic(2 * _size(eqn.outvars[0]) * depth / devices)
        case "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            out_channels = kernel[params["dimension_numbers"].rhs_spec[0]]
            flops = 2 * _size(eqn.outvars[0]) * math.prod(kernel) / out_channels
            # Zeros that dilate the input of a strided convolution's gradient are not computed with.
            return Arithmetic(flops / math.prod(params["lhs_dilation"]) / devices)
        case "scan":
            return count(params["jaxpr"], share_within, devices) * params["length"]
        case "cond":
            branches = [count(branch, share_within, devices) for branch in params["branches"]]
            branches.sort(key=lambda branch: branch.flops)
            share = share_of(place)
            return branches[-1] * share + branches[0] * (1 - share)
        case "shard_map":
            return count(params["jaxpr"], share_within)
        case "pallas_call":
            runs = math.prod(params["grid_mapping"].grid)
            flops = count(params["jaxpr"], share_within).flops * runs / devices
            arrays = (*eqn.invars, *eqn.outvars)
            moved = sum(_size(array) * array.aval.dtype.itemsize for array in arrays) / devices
            return Arithmetic(flops, flops, moved)
        case _:
            total = Arithmetic()
            for inner in jax.tree.leaves(params, is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    total += count(inner, share_within, devices)
            return total


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)

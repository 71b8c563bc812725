"""The time and the traffic of a compiled TPU program, read from its text.

The compiler notes how many cycles it expects of each operation. A loop's body is written once and
a conditional's branches all are, so that the sums take trip counts and shares into account.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Sequence

_COMPUTATION = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (.*?) ([\w-]+)\((.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((-?\d+)\)")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass
class ProgramCost:
    """What one run of a program costs a chip.

    Attributes:
        cycles: by kind of operation, see `kind_of`; custom kernels have no estimate.
        collective_bytes: that a chip contributes to collectives, by their name.
    """

    cycles: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    collective_bytes: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "ProgramCost", times: float) -> None:
        for mine, its in (
            (self.cycles, other.cycles),
            (self.collective_bytes, other.collective_bytes),
        ):
            for name, value in its.items():
                mine[name] += value * times


def program_cost(text: str, share_of: Callable[[str], float]) -> ProgramCost:
    """Adds up a compiled program.

    Args:
        text: of the compiled program.
        share_of: from a conditional's op_name to how often the costlier of its branches is run.

    Returns:
        The cost of the entry computation, with all that it calls.
    """
    computations: dict[str, list[str]] = {}
    entry = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            lines = computations.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif line.startswith("  ") and computations:
            lines.append(line)
    costs: dict[str, ProgramCost] = {}

    def cost_of(name: str) -> ProgramCost:
        if name not in costs:
            costs[name] = total = ProgramCost()
            for line in computations[name]:
                add_instruction(total, line)
        return costs[name]

    def add_instruction(total: ProgramCost, line: str) -> None:
        match = _INSTRUCTION.match(line)
        if match is None:
            return
        _, shape, opcode, rest = match.groups()
        op_name = _OP_NAME.search(rest)
        op_name = op_name[1] if op_name else ""
        if opcode == "while":
            trips = _trip_count(computations[_called(rest, "condition")[0]])
            total.add(cost_of(_called(rest, "body")[0]), trips)
        elif opcode == "conditional":
            # Where the compiler has not said which branch costs more, the longer one does.
            names = _called(rest, "branch_computations")
            names.sort(key=lambda name: (cost_of(name).cycles.total(), len(computations[name])))
            share = share_of(op_name)
            total.add(cost_of(names[-1]), share)
            total.add(cost_of(names[0]), 1 - share)
        elif opcode in ("call", "async-start"):
            for name in _called(rest, "to_apply") + _called(rest, "calls"):
                total.add(cost_of(name), 1)
        else:
            cycles = _CYCLES.search(rest)
            if cycles:
                total.cycles[kind_of(op_name, opcode)] += int(cycles[1])
            collective = opcode.removesuffix("-start")
            if collective in _COLLECTIVES:
                # What starts one has its operand in its result, beside the result itself.
                halves = 2 if opcode.endswith("-start") and shape.startswith("(") else 1
                total.collective_bytes[collective] += num_bytes(shape) / halves

    return cost_of(entry)


def kind_of(op_name: str, opcode: str) -> str:
    """The last part of an operation's name in JAX, or what the compiler calls it."""
    return op_name.rsplit("/", 1)[-1] or opcode


def num_bytes(shape: str) -> int:
    """Bytes of all arrays in the text of a shape."""
    total = 0
    for _, width, sizes in _ARRAY.findall(shape):
        bits = int(width or 8)  # pred has no number, and a byte
        total += math.prod(map(int, filter(None, sizes.split(",")))) * max(bits // 8, 1)
    return total


def _called(rest: str, attribute: str) -> list[str]:
    match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.-]+)", rest)
    return re.findall(r"%([\w.-]+)", match[1]) if match else []


def _trip_count(condition: Sequence[str]) -> int:
    """Of a loop that counts to a constant, as every scan does; 1 of any other."""
    constants = [int(match[1]) for match in map(_CONSTANT.search, condition) if match]
    compares = any(" compare(" in line for line in condition)
    return max(constants[0], 1) if compares and len(constants) == 1 else 1

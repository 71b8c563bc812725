"""Layers that are all alike, which a network runs in a loop: compiled once, however many there are.

Their weights lie behind one another. What is [i, o] in one of twelve layers is [12, i, o] in the
tree of parameters, and the layers are called `layers.*` there, where files have `layers.0` to
`layers.11`.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.linen as nn

EVERY = ".*"
"""What a name ends in that stands for all layers."""

Path = tuple[str, ...]
Carry = TypeVar("Carry")


def run_layers(
    apply: Callable[..., Carry], layer: nn.Module, number: int, carry: Carry, *constants: Any
) -> Carry:
    """Runs `number` layers like `layer`, one after the other.

    Args:
        apply: `apply(layer, carry, *constants)` is what a layer makes of what it is handed.
        layer: whose name ends in `EVERY`.
        number: of layers.
        carry: what the first is handed; arrays whose shapes all layers keep.
        constants: that all layers see.
    """
    scan = nn.scan(
        lambda *arguments: (apply(*arguments), None),
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=number,
    )
    return scan(layer, carry, *constants)[0]


def is_stacked(path: Sequence[str]) -> bool:
    """Whether the first axis of the parameter at `path` counts layers."""
    return any(name.endswith(EVERY) for name in path)


def single_layers(path: Path, shape: tuple[int, ...]) -> list[tuple[Path, tuple[int, ...]]]:
    """The path and the shape of a parameter in each layer; its own, where it is not stacked."""
    if not is_stacked(path):
        return [(path, shape)]

    def within(index: int) -> Path:
        stems = ((name, name.removesuffix(EVERY)) for name in path)
        return tuple(name if name == stem else f"{stem}.{index}" for name, stem in stems)

    return [(within(index), shape[1:]) for index in range(shape[0])]

"""What training changes: factors of low rank, or all weights. Two types that are used alike.

Settings (`Lora`, `AllWeights`) make the tree that is trained. A tree with its scale folded in
(`Factors`, `Changes`) is what a network takes: a `core.generator.Adapter`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import flax.struct
from jaxtyping import Array, Key

from alignprop_jax.lora.factors import (
    ATTENTION_PROJECTIONS,
    LoraTree,
    adapt,
    init_changes,
    init_lora,
    scale_lora,
)
from alignprop_jax.lora.names import UNET


@flax.struct.dataclass
class Factors:
    """Low-rank factors, {"down": [in, r], "up": [r, out]} at each layer; the change is down up."""

    tree: LoraTree

    def scaled(self, scale: float | Array) -> "Factors":
        """The factors whose change is `scale` times that of these."""
        return Factors(scale_lora(self.tree, scale))

    def variables(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Weights, and factors as a collection of their own, which linear layers look up."""
        return adapt(weights, self.tree)


def factors_of_network(parts: LoraTree | None) -> Factors | None:
    """The network's factors of a LoRA by parts, as `files.load_lora` gives it; None for none."""
    return None if parts is None else Factors(parts[UNET])


@flax.struct.dataclass
class Changes:
    """A change of every weight, {"change": [...]} of the weight's own shape."""

    tree: LoraTree

    def scaled(self, scale: float | Array) -> "Changes":
        """`scale` times these changes."""
        return Changes(scale_lora(self.tree, scale))

    def variables(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """The changed weights."""
        return adapt(weights, self.tree)


class Adaptation(Protocol):
    """How a network is changed."""

    def init(self, key: Key[Array, ""], weights: Mapping[str, Any]) -> LoraTree:
        """The tree that is trained, which changes nothing at first."""

    def bind(self, tree: LoraTree) -> Factors | Changes:
        """What the network takes of a trained tree."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (Hu et al., arXiv 2106.09685): x W + (alpha / rank) (x down) up.

    Attributes:
        rank: r, the same for every layer.
        alpha: the scale of the change, times r.
        targets: names of the layers, see `factors.init_lora`.
    """

    rank: int = 4
    alpha: float = 4.0
    targets: Sequence[str] = ATTENTION_PROJECTIONS

    @property
    def scale(self) -> float:
        """What multiplies down up."""
        return self.alpha / self.rank

    def init(self, key: Key[Array, ""], weights: Mapping[str, Any]) -> LoraTree:
        """See `Adaptation`.

        Raises:
            UserError: as `factors.init_lora`.
        """
        return init_lora(key, weights, self.rank, self.targets)

    def bind(self, tree: LoraTree) -> Factors:
        """The factors with their scale folded in."""
        return Factors(scale_lora(tree, self.scale))


@dataclasses.dataclass(frozen=True)
class AllWeights:
    """A full fine-tuning: every weight is changed."""

    def init(self, key: Key[Array, ""], weights: Mapping[str, Any]) -> LoraTree:
        """See `Adaptation`; zeros."""
        del key
        return init_changes(weights)

    def bind(self, tree: LoraTree) -> Changes:
        """The changes as they are."""
        return Changes(tree)

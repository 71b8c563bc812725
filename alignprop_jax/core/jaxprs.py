"""Walking traced programs."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core


def inner_jaxprs(eqn: Any) -> Iterator[core.Jaxpr]:
    """The programs that an equation of a program runs, such as the body of a loop."""
    for leaf in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr):
        if _is_jaxpr(leaf):
            yield getattr(leaf, "jaxpr", leaf)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)

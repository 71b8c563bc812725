"""How a network is computed, which changes its cost and not what it computes."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from alignprop_jax.nn import saved_names
from alignprop_jax.nn.attention_functions import Attend, attend_in_blocks


@dataclasses.dataclass(frozen=True)
class Execution:
    """Settings that all modules of a network share.

    Attributes:
        dtype: of activations, and of weights as they are used. Softmax and the statistics of norms
            are in float32 whatever it is.
        attend: the attention of all heads, such as one of `attention_functions`.
        remat: the backward pass evaluates every block of the network again, so that only what goes
            from block to block is stored, and what attention gave.
    """

    dtype: jnp.dtype = jnp.dtype("float32")
    attend: Attend = attend_in_blocks
    remat: bool = False


class NetworkModule(nn.Module):
    """A module with a field `execution: Execution`, and what it needs of it all the time."""

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations, and of weights as they are used."""
        return self.execution.dtype

    def block(self, module: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """The class of a block of the network, as it is to be computed."""
        return rematerialized(module) if self.execution.remat else module


def rematerialized(module: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The class of a module that the backward pass evaluates again, but for attention."""
    policy = jax.checkpoint_policies.save_only_these_names(saved_names.ATTENTION)
    return nn.remat(module, policy=policy)

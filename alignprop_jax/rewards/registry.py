"""Rewards by name, by file, or as a weighted sum."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from alignprop_jax.errors import UserError
from alignprop_jax.rewards.base import Reward
from alignprop_jax.rewards.user import load_user_reward
from alignprop_jax.rewards.weighted_sum import weighted_sum

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Entry(NamedTuple):
    factory: Callable[..., Reward]
    section: str


_REGISTERED: dict[str, _Entry] = {}


def register(
    name: str, section: str = ""
) -> Callable[[Callable[..., Reward]], Callable[..., Reward]]:
    """Makes a function that returns a `Reward` known to `make_reward` by name.

    Args:
        name: of the reward.
        section: of a config, whose keys are the function's arguments; by default that of its name.
    """

    def add(factory: Callable[..., Reward]) -> Callable[..., Reward]:
        if name in _REGISTERED:
            raise ValueError(f"reward {name!r} is registered twice")
        _REGISTERED[name] = _Entry(factory, section or name)
        return factory

    return add


def make_reward(
    spec: str | Mapping[str, float],
    tokenizer: "PreTrainedTokenizerBase",
    sections: Mapping[str, Any] | None = None,
    dtype: Any = None,
) -> Reward:
    """Makes the reward of a config.

    Args:
        spec: a registered name, "path/to/file.py:function", or weights by name or file for the
            weighted sum of several.
        tokenizer: the diffusion model's, whose token ids a user's function gets.
        sections: by name the sections of a config that rewards have their arguments from; what
            belongs to no reward is not looked at.
        dtype: of the weights and activations of networks; None for float32.

    Raises:
        UserError: there is no such reward, or it cannot be made.
    """
    if isinstance(spec, Mapping):
        return weighted_sum(
            {name: make_reward(name, tokenizer, sections, dtype) for name in spec}, dict(spec)
        )
    if spec in _REGISTERED:
        factory, section = _REGISTERED[spec]
        arguments = dict((sections or {}).get(section, {}))
        if dtype is not None and "dtype" in inspect.signature(factory).parameters:
            arguments["dtype"] = dtype
        return factory(**arguments)
    if ".py:" in spec:
        return load_user_reward(spec, tokenizer)
    raise UserError(
        f"reward {spec!r} not found; give {', '.join(sorted(_REGISTERED))} or "
        "path/to/file.py:function"
    )

"""Rewards by name, by file, or as a weighted sum."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from alignprop_jax.errors import UserError
from alignprop_jax.rewards.base import Reward
from alignprop_jax.rewards.user import load_user_reward
from alignprop_jax.rewards.weighted_sum import weighted_sum

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FACTORIES: dict[str, Callable[..., Reward]] = {}


def register(name: str) -> Callable[[Callable[..., Reward]], Callable[..., Reward]]:
    """Makes a function that returns a `Reward` known to `make_reward` by name."""

    def add(factory: Callable[..., Reward]) -> Callable[..., Reward]:
        if name in _FACTORIES:
            raise ValueError(f"reward {name!r} is registered twice")
        _FACTORIES[name] = factory
        return factory

    return add


def make_reward(
    spec: str | Mapping[str, float],
    tokenizer: "PreTrainedTokenizerBase",
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Reward:
    """Makes the reward of a config.

    Args:
        spec: a registered name, "path/to/file.py:function", or weights by name or file for the
            weighted sum of several.
        tokenizer: the diffusion model's, whose token ids a user's function gets.
        options: for each registered name the keyword arguments of its factory.

    Raises:
        UserError: there is no such reward, or it cannot be made.
    """
    if isinstance(spec, Mapping):
        return weighted_sum(
            {name: make_reward(name, tokenizer, options) for name in spec}, dict(spec)
        )
    if spec in _FACTORIES:
        return _FACTORIES[spec](**(options or {}).get(spec, {}))
    if ".py:" in spec:
        return load_user_reward(spec, tokenizer)
    raise UserError(
        f"reward {spec!r} not found; give {', '.join(sorted(_FACTORIES))} or "
        "path/to/file.py:function"
    )

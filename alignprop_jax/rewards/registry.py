"""Rewards by name, by file, or as a weighted sum."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from alignprop_jax.errors import UserError
from alignprop_jax.rewards.base import Reward, Score
from alignprop_jax.rewards.user import load_user_reward

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
        return _weighted_sum(
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


def _weighted_sum(rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> Reward:
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"the weight of reward {name!r} must be a number, not {weight!r}")
    if not rewards:
        raise UserError("a sum of rewards needs one at least: give {name: weight}")

    def part(name: str) -> Score:
        reward = rewards[name]
        return lambda params, images, inputs: reward.score(params[name], images, inputs[name])

    parts = {name: part(name) for name in rewards}

    def score(params, images, inputs):
        return sum(weights[name] * part(params, images, inputs) for name, part in parts.items())

    return Reward(
        name=" + ".join(f"{weight:g} {name}" for name, weight in weights.items()),
        params={name: reward.params for name, reward in rewards.items()},
        score=score,
        prepare=lambda prompts: {name: reward.prepare(prompts) for name, reward in rewards.items()},
        parts=parts,
    )

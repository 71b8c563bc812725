"""Reading the `config.json` of a model folder, where what is not implemented is refused."""

from collections.abc import Mapping
from typing import Any

from alignprop_jax.errors import UserError


def refuse_unsupported(
    config: Mapping[str, Any], supported: Mapping[str, tuple], model: str
) -> None:
    """Raises UserError for a key whose value asks for an architecture that is not implemented.

    Args:
        config: the parsed config.json.
        supported: for each key, the values that leave the architecture as implemented. A key that
            is absent from `config` stands for its default and passes.
        model: the name to use in the error.
    """
    for key, allowed in supported.items():
        if key in config and config[key] not in allowed:
            raise UserError(
                f"{model}: config.json has {key}={config[key]!r}, which is not supported "
                f"(supported: {', '.join(map(repr, allowed))})"
            )


def per_block(key: str, value: Any, num_blocks: int) -> tuple:
    """One value a block, from a scalar or from a list that has one already."""
    if isinstance(value, (list, tuple)):
        if len(value) != num_blocks:
            raise UserError(
                f"config.json lists {len(value)} values of {key} for {num_blocks} blocks: {value}"
            )
        return tuple(value)
    return (value,) * num_blocks

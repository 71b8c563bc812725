"""JSON that others wrote: read within bounds, and checked against a declared schema.

A schema maps each key to a `Field`. What a file says under another key is not looked at, as in
diffusers and transformers.

    SCHEMA = {
        "in_channels": integer(1, 65536, default=4),
        "act_fn": one_of("silu", "swish", default="silu"),
        "block_out_channels": list_of(integer(1, 65536), 1, 16),  # no default: the key is needed
    }
    values = read_fields(read_json_object(path), SCHEMA)
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignprop_jax.errors import UserError, require_file

# More than an index of a thousand files of weights has, or a tokenizer.
_MAX_BYTES = 64 * 2**20
_SHOWN_CHARACTERS = 60
_NEEDED = object()


@dataclasses.dataclass(frozen=True)
class Field:
    """What a key may hold.

    `parse` returns the value in the type that the program works with, and raises TypeError or
    ValueError for one that is not allowed. `allowed` says in words what is.
    """

    parse: Callable[[Any], Any]
    allowed: str
    default: Any = _NEEDED


Schema = Mapping[str, Field]


def integer(least: int, most: int, default: Any = _NEEDED) -> Field:
    """A whole number from `least` to `most`, both included."""

    def parse(value: Any) -> int:
        _require(type(value) is int and least <= value <= most)
        return value

    return Field(parse, f"a whole number from {least} to {most}", default)


def number(least: float, most: float, default: Any = _NEEDED) -> Field:
    """A finite number from `least` to `most`, both included; a float."""

    def parse(value: Any) -> float:
        _require(type(value) in (int, float) and least <= value <= most)
        _require(math.isfinite(value))
        return float(value)

    return Field(parse, f"a number from {least:g} to {most:g}", default)


def boolean(default: Any = _NEEDED) -> Field:
    """True or false."""

    def parse(value: Any) -> bool:
        _require(type(value) is bool)
        return value

    return Field(parse, "true or false", default)


def text(default: Any = _NEEDED, most: int = 1000) -> Field:
    """A string of at most `most` characters."""

    def parse(value: Any) -> str:
        _require(type(value) is str and len(value) <= most)
        return value

    return Field(parse, f"a string of at most {most} characters", default)


def one_of(*values: Any, default: Any = _NEEDED) -> Field:
    """One of some strings, numbers, booleans and None: what is implemented."""

    def parse(value: Any) -> Any:
        _require(any(type(value) is type(known) and value == known for known in values))
        return value

    return Field(parse, " or ".join(json.dumps(value) for value in values), default)


def list_of(item: Field, shortest: int, longest: int, default: Any = _NEEDED) -> Field:
    """A list of `shortest` to `longest` items, each as `item` allows; a tuple."""

    def parse(value: Any) -> tuple:
        _require(isinstance(value, (list, tuple)) and shortest <= len(value) <= longest)
        return tuple(map(item.parse, value))

    size = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
    return Field(parse, f"a list of {size} items, each {item.allowed}", default)


def mapping_of(item: Field, most: int, default: Any = _NEEDED) -> Field:
    """An object of at most `most` keys, whose values are each as `item` allows; a dict."""

    def parse(value: Any) -> dict[str, Any]:
        _require(isinstance(value, Mapping) and len(value) <= most)
        return {key: item.parse(inner) for key, inner in value.items()}

    return Field(parse, f"an object of at most {most} keys, each {item.allowed}", default)


def section(default: Any = _NEEDED) -> Field:
    """An object that a schema of its own reads."""

    def parse(value: Any) -> Mapping[str, Any]:
        _require(isinstance(value, Mapping))
        return value

    return Field(parse, "an object", default)


def either(first: Field, second: Field, default: Any = _NEEDED) -> Field:
    """What one of two fields allows, the first where both do."""

    def parse(value: Any) -> Any:
        try:
            return first.parse(value)
        except (TypeError, ValueError):
            return second.parse(value)

    return Field(parse, f"{first.allowed}, or {second.allowed}", default)


def optional(field: Field) -> Field:
    """The same, or null, which stands for the default as in diffusers and transformers.

    A field without a default has None then.
    """
    default = None if field.default is _NEEDED else field.default

    def parse(value: Any) -> Any:
        return default if value is None else field.parse(value)

    return Field(parse, f"{field.allowed}, or null", default)


def read_fields(config: Mapping[str, Any], schema: Schema, prefix: str = "") -> dict[str, Any]:
    """The value of every key of the schema; its default where the config lacks it.

    Args:
        config: an object of a file; it is the caller who knows which, and says so in the error.
        schema: the keys to read.
        prefix: of the keys in errors, such as "text_config." for an object in another.

    Raises:
        UserError: the value of a key is not allowed, or a key without a default is missing. The
            message names the key, the value and what is allowed.
    """
    values = {}
    for key, field in schema.items():
        if key not in config:
            if field.default is _NEEDED:
                raise UserError(f"lacks the key {prefix}{key}, which is {field.allowed}")
            values[key] = field.default
            continue
        try:
            values[key] = field.parse(config[key])
        except (TypeError, ValueError, OverflowError) as error:
            raise refused(prefix + key, config[key], field.allowed) from error
    return values


def refused(key: str, value: Any, allowed: str) -> UserError:
    """What is raised for a value that is not as `allowed` says in words."""
    return UserError(f"{key}={shorten(value)} is not supported; it must be {allowed}")


def check_divisible(key: str, values: Sequence[int], by: str, divisor: int) -> None:
    """Raises UserError where `divisor`, the value of the key `by`, does not divide the values."""
    if any(value % divisor for value in values):
        raise refused(key, values, f"divisible by {by}={divisor}")


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
        UserError: the file is absent, cannot be read, is larger than 64 MiB, or holds no JSON
            object. The message names the file.
    """
    require_file(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, so not what it should be")
        # With or without the mark that some editors put in front.
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{path}: cannot be read as a JSON object ({reason})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {shorten(value)}, where a JSON object belongs")
    return value


def read_json_fields(path: Path, schema: Schema) -> dict[str, Any]:
    """What `read_fields` makes of the object that a file holds; its errors name the file."""
    config = read_json_object(path)
    try:
        return read_fields(config, schema)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def shorten(value: Any) -> str:
    """A value as a message shows it: as in the file, cut where it is long."""
    try:
        shown = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        shown = type(value).__name__
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError

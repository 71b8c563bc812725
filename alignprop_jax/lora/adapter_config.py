"""PEFT's LoraConfig, which files of diffusers and PEFT carry beside the tensors of a LoRA."""

import collections
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignprop_jax.errors import UserError
from alignprop_jax.inputs.foreign_json import (
    boolean,
    mapping_of,
    number,
    optional,
    parse_json_object,
    read_fields,
    read_json_object,
    shorten,
)

# Where diffusers (0.35 and later) keeps the configs of the parts of a model, as JSON.
HEADER_KEY = "lora_adapter_metadata"

_ALPHA = number(-1e6, 1e6)
_SCHEMA = {
    "lora_alpha": _ALPHA,
    "alpha_pattern": optional(mapping_of(_ALPHA, 10_000, default={})),
    "use_rslora": optional(boolean(default=False)),
    "use_dora": optional(boolean(default=False)),
    "lora_bias": optional(boolean(default=False)),
}
_FORMS = {"use_dora": "a DoRA", "lora_bias": "a LoRA with biases"}
# The name of a layer or its end, as PEFT and diffusers write it; and a regular expression of so few
# repetitions that it takes no longer than the square of the length of a name.
_NAME = re.compile(r"\^?[\w-]+(?:\.[\w-]+)*")
_PATTERN = re.compile(r"\^?(?:(?:[\w.-]|\\[.\-dw])[*+?]?)+\$?")
_MOST_REPETITIONS = 2
_LONGEST_PATTERN = 300
_MOST_PATTERNS = 100


class AdapterConfigs:
    """The configs of a file, by part of the model; without any, all scales are 1."""

    def __init__(self, file: Path, header: str | None):
        """Reads the header's, or PEFT's adapter_config.json beside `file`.

        Raises:
            UserError: a config is malformed, or of a kind that is not supported.
        """
        config: Mapping[str, Any] = {}
        beside = file.with_name("adapter_config.json")
        if header is not None:
            config = parse_json_object(header, f"the header's {HEADER_KEY}")
        elif file.name == "adapter_model.safetensors" and beside.exists():
            config = read_json_object(beside)
        self._by_part = {}
        for part in ("unet", "text_encoder", "text_encoder_2"):
            of_part = {
                key.removeprefix(f"{part}."): value
                for key, value in config.items()
                if key.startswith(f"{part}.") or (part == "unet" and "." not in key)
            }
            if of_part:
                self._by_part[part] = _read(of_part)

    def scale(self, part: str, layer: str, rank: int) -> float:
        """What multiplies lora_B lora_A, by PEFT's rules."""
        config = self._by_part.get(part)
        if config is None:
            return 1.0
        alpha = config["alpha_pattern"].get(layer)
        alpha = config["lora_alpha"] if alpha is None else alpha
        # Rank-stabilized LoRA divides by the root (Kalajdzievski, 2023, arXiv 2312.03732).
        return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        values = read_fields(config, _SCHEMA)
    except UserError as error:
        raise UserError(f"its adapter configuration: {error}") from error
    for key, kind in _FORMS.items():
        if values[key]:
            raise UserError(
                f"its adapter configuration has {key}: it is {kind}, which is not supported; plain "
                "LoRAs are"
            )
    return values | {"alpha_pattern": _LayerPatterns(values["alpha_pattern"])}


class _LayerPatterns:
    r"""The values of layers by patterns of their names, of which the first that fits counts.

    PEFT asks for `(.*\.)?(PATTERN)$`. Of all regular expressions those are taken that end in time.
    """

    def __init__(self, patterns: Mapping[str, float]):
        self._values = list(patterns.values())
        self._names: dict[str, int] = {}
        self._expressions: list[tuple[int, bool, re.Pattern[str]]] = []
        for place, pattern in enumerate(patterns):
            for choice in pattern.split("|"):
                if _NAME.fullmatch(choice):
                    self._names.setdefault(choice, place)
                else:
                    expression = (place, choice.startswith("^"), _compile(choice, pattern))
                    self._expressions.append(expression)
        if len(self._expressions) > _MOST_PATTERNS:
            raise UserError(
                f"its adapter configuration: alpha_pattern has {len(self._expressions)} regular "
                f"expressions; {_MOST_PATTERNS} are the most, besides names of layers"
            )

    def get(self, layer: str) -> float | None:
        parts = layer.split(".")
        # What may stand behind PEFT's `(.*\.)?`.
        ends = [".".join(parts[start:]) for start in range(len(parts))]
        fitting = [self._names[name] for name in (f"^{layer}", *ends) if name in self._names]
        for place, at_start, expression in self._expressions:
            if any(map(expression.fullmatch, ends[:1] if at_start else ends)):
                fitting.append(place)
        return self._values[min(fitting)] if fitting else None


def _compile(choice: str, pattern: str) -> re.Pattern[str]:
    repetitions = sum(choice.count(sign) for sign in "*+?")
    simple = _PATTERN.fullmatch(choice) is not None and len(choice) <= _LONGEST_PATTERN
    if not simple or repetitions > _MOST_REPETITIONS:
        raise UserError(
            f"its adapter configuration: the key {shorten(pattern)} of alpha_pattern is not "
            "supported; it must be the name of a layer or its end, in which .* may stand twice"
        )
    return re.compile(choice)


def lora_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The LoraConfig of factors whose scale is 1: alpha is the rank of each layer.

    It has every field that PEFT has had since 0.13, as PEFT saves them: some releases of diffusers
    look fields up and fail where they are absent, and releases of PEFT refuse those of later ones.

    Args:
        ranks: by layer.
    """
    (rank, _), *_ = collections.Counter(ranks.values()).most_common(1)
    other = {layer: other for layer, other in sorted(ranks.items()) if other != rank}
    return {
        "alpha_pattern": other,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": False,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": other,
        "revision": None,
        "target_modules": sorted(ranks),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def to_header(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """The configs of parts of a model as diffusers keeps them in the header, under `HEADER_KEY`."""
    flat = {f"{part}.{key}": value for part, of in configs.items() for key, value in of.items()}
    return json.dumps(flat, sort_keys=True)

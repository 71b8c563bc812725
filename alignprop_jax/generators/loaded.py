"""A generator that was loaded, with what encodes its prompts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import PyTree

from alignprop_jax.core.generator import Generator


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model as the programs take it.

    Attributes:
        generator: its modules and settings.
        params: frozen parameters of the chain; those of text encoders are not among them.
        encode: `encode(texts, lora=None)` gives texts as the generator takes them, with the texts
            as leading axis, and the text encoders changed by a LoRA by parts. It holds the text
            encoders: let go of it once all prompts are encoded.
        adaptable: by its name, the shapes of each part that a LoRA may adapt.
        tokenizer: of the first text encoder.
    """

    generator: Generator
    params: Any
    encode: Callable[..., PyTree]
    adaptable: Mapping[str, Any]
    tokenizer: Any

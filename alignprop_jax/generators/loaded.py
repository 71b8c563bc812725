"""A generator that was loaded, with what encodes its prompts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import PyTree

from alignprop_jax.core.generator import Generator


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model as the programs take it.

    Attributes:
        generator: its modules and settings.
        params: frozen parameters of the chain; those of text encoders are not among them.
        encode: gives texts as the generator takes them, with the texts as leading axis. It holds
            the text encoders: let go of it once all prompts are encoded.
        tokenizer: of the first text encoder.
    """

    generator: Generator
    params: Any
    encode: Callable[[Sequence[str]], PyTree]
    tokenizer: Any

"""Prompts as the UNet takes them: each distinct one through the text encoders, once."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from alignprop_jax.generators.stable_diffusion.generator import (
    TEXT_ENCODERS,
    Conditioning,
    Params,
    StableDiffusion,
    encode_prompts,
)
from alignprop_jax.loading.shapes_only import compute
from alignprop_jax.loading.tokenizer import tokenize
from alignprop_jax.lora.factors import LoraTree

# Prompts encoded at a time: the text encoder's activations of a long list would not fit.
_ENCODER_BATCH = 32


def encode(
    sd: StableDiffusion,
    params: Params,
    tokenizers: Sequence[Any],
    prompts: Sequence[str],
    lora: LoraTree | None = None,
) -> Conditioning:
    """Encodes every prompt; one that is said twice is encoded once.

    Args:
        tokenizers: one for each text encoder.
        lora: by part of the model, factors with their scale folded in.
    """
    distinct = list(dict.fromkeys(prompts))
    ids = [tokenize(tokenizer, distinct) for tokenizer in tokenizers]
    text_params = {name: params[name] for name in TEXT_ENCODERS if name in params}
    text_lora = {name: tree for name, tree in (lora or {}).items() if name in text_params}

    def encode_all(text_params, text_lora, ids):
        def encode_one(ids):
            rows = [row[None] for row in ids]
            states = encode_prompts(sd, text_params, rows, text_lora)
            return jax.tree.map(lambda x: x[0], states)

        return jax.lax.map(encode_one, ids, batch_size=min(_ENCODER_BATCH, len(distinct)))

    # On the host, where it is taken apart and put together without a program for each.
    encoded = jax.device_get(compute(encode_all, text_params, text_lora, ids))
    if sd.zero_empty_prompts:
        said = np.array([bool(prompt) for prompt in distinct])
        encoded = jax.tree.map(
            lambda x: x * said.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype), encoded
        )
    return encoded[np.array([distinct.index(prompt) for prompt in prompts])]

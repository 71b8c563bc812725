"""A reward that a user wrote: a function in a Python file."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp

from alignprop_jax.errors import UserError
from alignprop_jax.loading.tokenizer import tokenize
from alignprop_jax.rewards.base import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_user_reward(spec: str, tokenizer: "PreTrainedTokenizerBase") -> Reward:
    """Loads "path/to/file.py:function".

    The function is called as `function(images, prompts)` while JAX traces it: images [B, H, W, 3]
    float32 in [0, 1], prompts int32 [B, L], the diffusion model's token ids. It returns [B].

    Raises:
        UserError: no such file or function, or the file fails when it is run.
    """
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"reward {spec!r}: no file {path!r}")
    module_spec = importlib.util.spec_from_file_location("alignprop_jax_user_reward", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"reward {spec!r}: {path} fails: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward {spec!r}: {path} has no function {name!r}")

    def score(params, images, input_ids):
        scores = function(images, input_ids)
        # What is no float array is left as it is for check_reward to name.
        floating = hasattr(scores, "dtype") and jnp.issubdtype(scores.dtype, jnp.floating)
        return scores.astype(jnp.float32) if floating else scores

    return Reward(
        name=name, params={}, score=score, prepare=lambda prompts: tokenize(tokenizer, prompts)
    )

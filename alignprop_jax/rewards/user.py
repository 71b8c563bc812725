"""A reward that a user wrote: a function in a Python file."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from alignprop_jax.errors import UserError
from alignprop_jax.inputs.python_files import blamed_on, run_python_file
from alignprop_jax.loading.tokenizer import tokenize
from alignprop_jax.rewards.base import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNTRACEABLE = (jax.errors.JAXTypeError, jax.errors.JAXIndexError)


def load_user_reward(spec: str, tokenizer: "PreTrainedTokenizerBase") -> Reward:
    """Loads "path/to/file.py:function".

    The function is called as `function(images, prompts)` while JAX traces it: images [B, H, W, 3]
    float32 in [0, 1], prompts int32 [B, L], the diffusion model's token ids. It returns [B].

    Raises:
        UserError: no such file or function, or the file fails when it is run; later, where the
            function fails when it is traced.
    """
    path, _, name = spec.rpartition(":")
    with blamed_on(f"reward {spec!r}"):
        function = getattr(run_python_file(path), name, None)
        if not callable(function):
            raise UserError(f"{path} has no function {name!r}")

    def score(params, images, input_ids):
        with blamed_on(f"reward {spec!r}"):
            try:
                scores = function(images, input_ids)
            except _UNTRACEABLE as error:
                raise UserError(
                    "it cannot be traced by JAX: use jax.numpy, and no Python branches on values "
                    f"({type(error).__name__})"
                ) from error
        # What is no float array is left as it is for check_reward to name.
        floating = hasattr(scores, "dtype") and jnp.issubdtype(scores.dtype, jnp.floating)
        return scores.astype(jnp.float32) if floating else scores

    return Reward(
        name=name,
        params={},
        score=score,
        prepare=lambda prompts: tokenize(tokenizer, prompts),
        source=spec,
    )

"""Samples that are no pictures are never taken for some."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from alignprop_jax.errors import UserError
from alignprop_jax.inputs.foreign_json import shorten

_SHOWN_PROMPTS = 3


def require_finite(images: Float[np.ndarray, "b H W 3"], prompts: Sequence[str]) -> None:
    """Raises UserError where an image has a value that is NaN or infinite; names its prompt."""
    lost = [
        prompt
        for image, prompt in zip(images, prompts, strict=True)
        if not np.isfinite(image).all()
    ]
    if not lost:
        return
    shown = ", ".join(shorten(prompt) for prompt in lost[:_SHOWN_PROMPTS])
    more = f" and {len(lost) - _SHOWN_PROMPTS} more" if len(lost) > _SHOWN_PROMPTS else ""
    raise UserError(
        f"of {len(images)} samples {len(lost)} are NaN or infinite: {shown}{more}. Either the LoRA "
        "is too strong (--lora=none leaves it out, a lower train.learning_rate tames it), or "
        "weights of the model are damaged, or too large for config.dtype=bfloat16"
    )

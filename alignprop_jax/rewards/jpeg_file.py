"""Compressibility as it is: the size of the file that Pillow writes, which has no gradient."""

import jax
import jax.numpy as jnp

from alignprop_jax.rewards.base import Reward, no_prompt_inputs
from alignprop_jax.rewards.file_size import jpeg_kilobytes
from alignprop_jax.rewards.registry import register


@register("jpeg_compress_file", section="jpeg")
def make_jpeg_compress_file_reward(quality: int = 95) -> Reward:
    """Minus the kB (1,000 bytes) of the image as JPEG by Pillow, its fixed headers left out.

    Args:
        quality: 1 to 100, as Pillow's.
    """
    return _make_reward("jpeg_compress_file", -1.0, quality)


@register("jpeg_incompress_file", section="jpeg")
def make_jpeg_incompress_file_reward(quality: int = 95) -> Reward:
    """What `jpeg_compress_file` gives, with the other sign."""
    return _make_reward("jpeg_incompress_file", 1.0, quality)


def _make_reward(name: str, factor: float, quality: int) -> Reward:
    kilobytes = jpeg_kilobytes(quality)

    def score(params, images, prompt_inputs):
        sizes = jax.ShapeDtypeStruct(images.shape[:1], jnp.float32)
        return factor * jax.pure_callback(lambda images: kilobytes(images, ()), sizes, images)

    return Reward(name, {}, score, no_prompt_inputs)

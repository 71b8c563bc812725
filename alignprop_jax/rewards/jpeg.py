"""Compressibility: the size of the image as a JPEG file (Black et al., arXiv 2305.13301)."""

from alignprop_jax.errors import UserError
from alignprop_jax.rewards.base import Reward, no_prompt_inputs
from alignprop_jax.rewards.jpeg_size import jpeg_bytes
from alignprop_jax.rewards.registry import register


@register("jpeg_compress", section="jpeg")
def make_jpeg_compress_reward(quality: int = 95) -> Reward:
    """Minus the kB (1,000 bytes) of the image as JPEG, its fixed headers left out.

    Args:
        quality: 1 to 100, as Pillow's.

    Raises:
        UserError: there is no such quality.
    """
    return _make_reward("jpeg_compress", -1e-3, quality)


@register("jpeg_incompress", section="jpeg")
def make_jpeg_incompress_reward(quality: int = 95) -> Reward:
    """The kB of the image as JPEG: what `jpeg_compress` gives, with the other sign."""
    return _make_reward("jpeg_incompress", 1e-3, quality)


def _make_reward(name: str, factor: float, quality: int) -> Reward:
    if not 1 <= quality <= 100:
        raise UserError(f"{name}: quality {quality} must lie between 1 and 100")

    def score(params, images, prompt_inputs):
        return factor * jpeg_bytes(images, quality)

    return Reward(name, {}, score, no_prompt_inputs)

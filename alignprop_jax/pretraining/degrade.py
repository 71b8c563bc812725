"""Pictures gone wrong, and the word for how: what a reward must not mistake for art."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter


def degrade(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, str]:
    """Spoils a picture in a random way.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        The spoilt picture, of the same shape, and "blurry", "faded" or "noisy".
    """
    word = str(rng.choice(list(_DEGRADATIONS)))
    return _DEGRADATIONS[word](rng, image), word


def _blur(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    radius = rng.uniform(1.5, 5.0)
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def _fade(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Mixes in a wash: a smooth gradient between two colours, over everything."""
    height, width = image.shape[:2]
    corners = rng.uniform(90, 255, size=(2, 2, 3)).astype(np.uint8)
    wash = Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)
    strength = rng.uniform(0.35, 1.0)
    return (image * (1 - strength) + np.asarray(wash) * strength).astype(np.uint8)


def _add_noise(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Adds noise that is constant over squares of one to four pixels."""
    height, width = image.shape[:2]
    side = int(rng.choice([1, 2, 4]))
    noise = rng.normal(0, rng.uniform(20, 70), size=(height // side, width // side, 3))
    noise = noise.repeat(side, axis=0).repeat(side, axis=1)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


_DEGRADATIONS: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "blurry": _blur,
    "faded": _fade,
    "noisy": _add_noise,
}

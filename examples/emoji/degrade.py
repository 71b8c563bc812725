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
    return _BLURS[rng.integers(len(_BLURS))](rng, image)


def defocus(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Blurs by a Gaussian."""
    radius = rng.uniform(1.5, 5.0)
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def smear(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Averages the picture along a line, as if it moved."""
    angle, length = rng.uniform(0, np.pi), rng.uniform(0.1, 0.3) * image.shape[1]
    along = np.linspace(-0.5, 0.5, 24) * length
    rows, columns = np.indices(image.shape[:2])
    moved = [_resample(image, rows + np.sin(angle) * s, columns + np.cos(angle) * s) for s in along]
    return np.mean(moved, axis=0).astype(np.uint8)


def melt(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Takes every pixel from somewhere near, a smoothly varying distance away."""
    height, width = image.shape[:2]
    knots = int(rng.integers(3, 8))
    size = rng.uniform(0.25, 0.5) * width / knots
    shifts = [
        np.asarray(
            Image.fromarray(rng.normal(0, size, (knots, knots)).astype(np.float32)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
        )
        for _ in range(2)
    ]
    rows, columns = np.indices((height, width)) + np.stack(shifts)
    return _resample(image, rows, columns).astype(np.uint8)


def _resample(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The picture at places between its pixels, by bilinear interpolation; its edge goes on."""
    height, width = image.shape[:2]
    rows, columns = np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)
    top, left = rows.astype(int), columns.astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    down, across = (rows - top)[..., None], (columns - left)[..., None]
    upper = (1 - across) * image[top, left] + across * image[top, right]
    lower = (1 - across) * image[bottom, left] + across * image[bottom, right]
    return (1 - down) * upper + down * lower


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


_BLURS = (defocus, smear, melt)
_DEGRADATIONS: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "blurry": _blur,
    "faded": _fade,
    "noisy": _add_noise,
}

"""Random changes to batches of pictures, in JAX, for judges of pictures that are not quite clean.

All take float32 [B, S, S, C] in [0, 1] and draw anew for every picture of the batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

# Rows: luma and two axes of chroma at right angles, so that a turn in their plane is a hue shift.
_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32
)
_RGB = np.linalg.inv(_YIQ).astype(np.float32)


def uniform(key: Key[Array, ""], batch: int, low: float, high: float) -> Float[Array, "b 1 1 1"]:
    """A number for each picture."""
    return jax.random.uniform(key, (batch, 1, 1, 1), minval=low, maxval=high)


def warp(
    key: Key[Array, ""],
    images: Float[Array, "b s s c"],
    scale: tuple[float, float] = (0.7, 1.0),
    rotation: float = 0.26,
    shift: float = 0.08,
    elastic: float = 1.2,
) -> Float[Array, "b s s c"]:
    """Flips, shrinks, turns, shifts and gently bends; what comes from outside is 0.

    Args:
        scale: range of the size, in parts of the picture's.
        rotation: largest angle, in radians.
        shift: largest shift of the middle, in parts of the picture's edge.
        elastic: standard deviation of the bend, in pixels.
    """
    batch, size = images.shape[:2]
    keys = jax.random.split(key, 6)
    angle = uniform(keys[0], batch, -rotation, rotation)[..., 0]
    zoom = 1 / uniform(keys[1], batch, *scale)[..., 0]
    flip = jax.random.rademacher(keys[2], (batch, 1, 1), jnp.float32)
    offsets = shift * size * jax.random.uniform(keys[3], (2, batch, 1, 1), minval=-1, maxval=1)
    bend = elastic * smooth_fields(keys[4], batch, size, 2, 10.0)

    y, x = (axis[None] - (size - 1) / 2 for axis in np.mgrid[:size, :size].astype(np.float32))
    y, x = y - offsets[0], x - offsets[1]
    cos, sin = jnp.cos(angle) * zoom, jnp.sin(angle) * zoom
    rows = sin * x + cos * y + bend[..., 0] + (size - 1) / 2
    columns = flip * (cos * x - sin * y) + bend[..., 1] + (size - 1) / 2
    return jax.vmap(_sample)(images, rows, columns)


def _sample(
    image: Float[Array, "s s c"], rows: Float[Array, "s s"], columns: Float[Array, "s s"]
) -> Float[Array, "s s c"]:
    """Bilinear; a border of zeros around the image stands for all that is outside."""
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
    limit = padded.shape[0] - 1.001
    rows, columns = (jnp.clip(axis + 1, 0, limit) for axis in (rows, columns))
    top, left = (jnp.floor(axis).astype(jnp.int32) for axis in (rows, columns))
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    upper = padded[top, left] * (1 - right) + padded[top, left + 1] * right
    lower = padded[top + 1, left] * (1 - right) + padded[top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


def blur(
    images: Float[Array, "b s s c"], sigma: Float[Array, "b 1 1 1"]
) -> Float[Array, "b s s c"]:
    """Gaussian blur with a standard deviation in pixels for each picture; edges are extended."""
    pixels = np.arange(images.shape[1], dtype=np.float32)
    distance = pixels[None, :, None] - pixels[None, None, :]
    kernel = jnp.exp(-0.5 * (distance / jnp.maximum(sigma[..., 0], 1e-3)) ** 2)
    kernel /= kernel.sum(-1, keepdims=True)
    rows = jnp.einsum("bij,bjkc->bikc", kernel, images)
    return jnp.einsum("bik,bjkc->bjic", kernel, rows)


def smooth_fields(
    key: Key[Array, ""], batch: int, size: int, channels: int, sigma: float
) -> Float[Array, "b s s c"]:
    """Noise that varies over about `sigma` pixels, with mean 0 and standard deviation 1."""
    knots = np.linspace(-0.5, size - 0.5, int(1.5 * size / sigma) + 2)
    spread = np.exp(-0.5 * (np.subtract.outer(np.arange(size), knots) / sigma) ** 2)
    spread = spread.astype(np.float32)
    noise = jax.random.normal(key, (batch, len(knots), len(knots), channels))
    fields = jnp.einsum("ij,bjkc->bikc", spread, noise)
    fields = jnp.einsum("ik,bjkc->bjic", spread, fields)
    fields -= fields.mean((1, 2), keepdims=True)
    return fields / fields.std((1, 2), keepdims=True)


def jitter_color(
    key: Key[Array, ""], images: Float[Array, "b s s 3"], hue: float
) -> Float[Array, "b s s 3"]:
    """Changes hue, saturation, contrast and brightness of the whole picture.

    Args:
        hue: standard deviation of the shift, in radians.
    """
    batch = images.shape[0]
    keys = jax.random.split(key, 4)
    angle = hue * jax.random.normal(keys[0], (batch, 1, 1))
    saturation = uniform(keys[1], batch, 0.6, 1.25)[..., 0]
    contrast = uniform(keys[2], batch, 0.75, 1.1)
    brightness = uniform(keys[3], batch, -0.08, 0.08)
    luma, i, q = jnp.moveaxis(images @ _YIQ.T, -1, 0)
    cos, sin = jnp.cos(angle) * saturation, jnp.sin(angle) * saturation
    colors = jnp.stack([luma, cos * i - sin * q, sin * i + cos * q], -1) @ _RGB.T
    # Around white, which most pictures stand on.
    return jnp.clip(1 + contrast * (colors - 1) + brightness, 0, 1)


def compress(
    key: Key[Array, ""], images: Float[Array, "b s s c"], strength: float = 0.15
) -> Float[Array, "b s s c"]:
    """Rounds the cosine transform of 8x8 blocks, coarser at high frequencies, as JPEG does.

    Args:
        strength: largest step of the highest frequency, against values in [0, 1].
    """
    batch, size, _, channels = images.shape
    n = np.arange(8)
    dct = np.sqrt(2 / 8) * np.cos(np.pi * (2 * n[None] + 1) * n[:, None] / 16)
    dct[0] /= np.sqrt(2)
    dct = dct.astype(np.float32)
    step = strength * (np.add.outer(n, n) + 1).astype(np.float32).reshape(1, 1, 8, 1, 8, 1) / 2
    step *= uniform(key, batch, 0.05, 1.0).reshape(batch, 1, 1, 1, 1, 1)
    blocks = images.reshape(batch, size // 8, 8, size // 8, 8, channels)
    spectrum = jnp.einsum("ui,bxiyjc,vj->bxuyvc", dct, blocks, dct)
    spectrum = step * jnp.round(spectrum / step)
    return jnp.einsum("ui,bxuyvc,vj->bxiyjc", dct, spectrum, dct).reshape(images.shape)


def add_noise(
    key: Key[Array, ""], images: Float[Array, "b s s c"], largest: float
) -> Float[Array, "b s s c"]:
    """Adds Gaussian noise of a standard deviation up to `largest`."""
    level_key, noise_key = jax.random.split(key)
    level = uniform(level_key, images.shape[0], 0.0, largest)
    return images + level * jax.random.normal(noise_key, images.shape)

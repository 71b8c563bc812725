"""The pictures that judges learn from: real emoji, spoilt a little, and pictures of nothing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from examples.emoji.augmentations import (
    add_noise,
    blur,
    compress,
    jitter_color,
    smooth_fields,
    uniform,
    warp,
)


def make_pictures(
    key: Key[Array, ""],
    sprites: Float[Array, "b s s 4"],
    num_empty: int,
    hue: float,
    damage: float,
    washed: float,
) -> Float[Array, "b s s 3"]:
    """Puts sprites on backgrounds and changes them at random, short of what they show.

    Args:
        sprites: RGBA in [0, 1], alpha premultiplied.
        num_empty: how many, from the end of the batch, are to show no object: see `_empty`.
        hue: standard deviation of the shift in hue, in radians.
        damage: scales blur, compression and noise; at 1 they cost small pictures their detail.
        washed: share of pictures that lie under a wash of colour, so that a soft gradient over flat
            art is not taken for shading.
    """
    batch = sprites.shape[0]
    keys = jax.random.split(key, 10)
    sprites = warp(keys[0], sprites)
    background = _backgrounds(keys[1], batch)
    pictures = sprites[..., :3] + background * (1 - sprites[..., 3:])
    if num_empty:
        spoilt = [array[-num_empty:] for array in (sprites, pictures, background)]
        pictures = jnp.concatenate([pictures[:-num_empty], _empty(keys[2], *spoilt)])
    pictures = jitter_color(keys[3], pictures, hue)
    if washed:
        pictures = _wash(jax.random.fold_in(key, 0), pictures, washed)
    return _damage(keys[4:], pictures, damage)


def make_scene_pictures(
    key: Key[Array, ""], scenes: Float[Array, "b s s 3"], num_empty: int, hue: float, damage: float
) -> Float[Array, "b s s 3"]:
    """Changes whole scenes at random, short of what they show.

    Arguments as for `make_pictures`; the empty ones are soft gradients.
    """
    batch, size = scenes.shape[:2]
    keys = jax.random.split(key, 11)
    if num_empty:
        empty = _gradient(keys[:4], num_empty, size)
        scenes = jnp.concatenate([scenes[:-num_empty], empty])
    return _damage(keys[5:], jitter_color(keys[4], scenes, hue), damage)


def _damage(
    keys: Key[Array, "6"], pictures: Float[Array, "b s s 3"], damage: float
) -> Float[Array, "b s s 3"]:
    """A light of its own, blur, compression and noise."""
    batch, size = pictures.shape[:2]
    # A light that varies over any picture, so that a gradient by itself says nothing about style.
    lit = jax.random.bernoulli(keys[0], 0.4, (batch, 1, 1, 1))
    light = 0.07 * smooth_fields(keys[1], batch, size, 1, 12.0)
    pictures *= 1 + jnp.where(lit, light, 0.0)
    pictures = blur(pictures, uniform(keys[2], batch, 0.0, damage))
    compressed = jax.random.bernoulli(keys[3], 0.5, (batch, 1, 1, 1))
    pictures = jnp.where(compressed, compress(keys[4], pictures, 0.15 * damage), pictures)
    return jnp.clip(add_noise(keys[5], pictures, 0.05 * damage), 0, 1)


def _backgrounds(key: Key[Array, ""], batch: int) -> Float[Array, "b 1 1 3"]:
    """White for most, any colour for the others."""
    white_key, color_key = jax.random.split(key)
    white = jax.random.bernoulli(white_key, 0.75, (batch, 1, 1, 1))
    return jnp.where(white, 1.0, jax.random.uniform(color_key, (batch, 1, 1, 3)))


def _gradient(keys: Key[Array, "4"], batch: int, size: int) -> Float[Array, "b s s 3"]:
    """Soft changes of colour, pastel for the most part: what pictures fade into."""
    base = 1 - uniform(keys[0], batch, 0.1, 1.0) * jax.random.uniform(keys[1], (batch, 1, 1, 3))
    depth = uniform(keys[2], batch, 0.0, 0.25)
    return jnp.clip(base + depth * smooth_fields(keys[3], batch, size, 3, 9.0), 0, 1)


def _wash(
    key: Key[Array, ""], pictures: Float[Array, "b s s 3"], share: float
) -> Float[Array, "b s s 3"]:
    """Mixes a share of the pictures with a gradient, to 60% at most."""
    batch, size = pictures.shape[:2]
    keys = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(keys[0], share, (batch, 1, 1, 1))
    weight = chosen * uniform(keys[1], batch, 0.1, 0.6)
    return (1 - weight) * pictures + weight * _gradient(jax.random.split(keys[2], 4), batch, size)


def _empty(
    key: Key[Array, ""],
    sprites: Float[Array, "b s s 4"],
    pictures: Float[Array, "b s s 3"],
    background: Float[Array, "b 1 1 3"],
) -> Float[Array, "b s s 3"]:
    """What a reward could be pleased by, though nothing is to be seen.

    One of: a soft gradient; noise; an object blurred beyond recognition, or all but lost in a
    gradient; a blob with a gradient inside it, as soft as shading.
    """
    batch, size = pictures.shape[:2]
    keys = jax.random.split(key, 8)
    gradient = _gradient(keys[:4], batch, size)
    noise = jnp.clip(gradient + 0.3 * jax.random.normal(keys[4], pictures.shape), 0, 1)
    blurred = blur(pictures, uniform(keys[5], batch, 4.0, 8.0))
    faint = uniform(keys[6], batch, 0.0, 0.12)
    paled = gradient + faint * (pictures - 1)
    alpha = (blur(sprites[..., 3:], jnp.full((batch, 1, 1, 1), 4.0)) > 0.5).astype(jnp.float32)
    blob = blur(gradient * alpha + background * (1 - alpha), jnp.full((batch, 1, 1, 1), 1.0))
    kinds = jnp.stack([gradient, noise, blurred, paled, blob])
    weights = jnp.array([0.25, 0.05, 0.2, 0.25, 0.25])
    choice = jax.random.choice(keys[7], len(kinds), (batch,), p=weights)
    return kinds[choice, jnp.arange(batch)]

"""What the augmentations keep and what they change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.emoji import augmentations

KEY = jax.random.key(3)
SIZE = 16


def pictures(batch=4, channels=3):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(size=(batch, SIZE, SIZE, channels)), jnp.float32)


def test_warp_of_nothing_is_the_picture_or_its_mirror():
    images = pictures(16)
    warped = augmentations.warp(KEY, images, (1.0, 1.0), rotation=0.0, shift=0.0, elastic=0.0)
    for image, result in zip(images, warped, strict=True):
        errors = [np.abs(result - image).max(), np.abs(result - image[:, ::-1]).max()]
        assert min(errors) < 1e-4
    assert np.abs(warped - images).max((1, 2, 3)).min() < 1e-4 < np.abs(warped - images).max()


def test_warp_shrinks_and_leaves_zeros_outside():
    warped = augmentations.warp(
        KEY, jnp.ones((4, SIZE, SIZE, 1)), (0.5, 0.5), rotation=0.0, shift=0.0, elastic=0.0
    )
    np.testing.assert_allclose(warped[:, 5:11, 5:11], 1, atol=1e-5)
    np.testing.assert_allclose(warped[:, :3], 0, atol=1e-5)
    # Half the edge is a quarter of the area; the bilinear rim adds to it.
    assert 0.25 < warped.mean() < 0.33


def test_blur_is_scipys():
    ndimage = pytest.importorskip("scipy.ndimage")
    image = np.zeros((1, 33, 33, 1), np.float32)
    image[0, 16, 16] = 1
    blurred = augmentations.blur(jnp.asarray(image), jnp.full((1, 1, 1, 1), 2.0))
    expected = ndimage.gaussian_filter(image[0, ..., 0], 2.0, truncate=8.0)
    np.testing.assert_allclose(blurred[0, ..., 0], expected, atol=1e-5)


def test_blur_of_nothing_and_of_a_constant():
    images = pictures()
    none = jnp.zeros((len(images), 1, 1, 1))
    np.testing.assert_allclose(augmentations.blur(images, none), images, atol=1e-6)
    constant = jnp.full_like(images, 0.3)
    np.testing.assert_allclose(augmentations.blur(constant, none + 5), constant, atol=1e-5)


def test_smooth_fields_are_normalised_and_smooth():
    fields = augmentations.smooth_fields(KEY, 8, 64, 2, 10.0)
    np.testing.assert_allclose(fields.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(fields.std((1, 2)), 1, atol=1e-4)
    # A field with a correlation length of 10 pixels changes little from one to the next.
    assert np.abs(np.diff(fields, axis=1)).mean() < 0.15


def test_hue_leaves_grays_gray():
    gray = jnp.broadcast_to(pictures(channels=1), (4, SIZE, SIZE, 3))
    jittered = augmentations.jitter_color(KEY, gray, hue=1.0)
    np.testing.assert_allclose(jittered, jittered.mean(-1, keepdims=True) + 0 * gray, atol=5e-3)


def test_compression_removes_detail_and_keeps_what_is_flat():
    images = pictures()
    compressed = augmentations.compress(KEY, images, strength=0.6)
    assert compressed.std() < images.std()
    blocks = [
        x.reshape(4, SIZE // 8, 8, SIZE // 8, 8, 3).mean((2, 4)) for x in (images, compressed)
    ]
    # The mean of a block is its first coefficient, over 8; it moves by half a step at most.
    np.testing.assert_allclose(*blocks, atol=0.6 / 2 / 2 / 8 + 1e-6)


def test_every_picture_draws_for_itself():
    same = jnp.broadcast_to(pictures(1), (3, SIZE, SIZE, 3))
    for change in (
        augmentations.warp,
        lambda key, x: augmentations.jitter_color(key, x, 0.5),
        augmentations.compress,
        lambda key, x: augmentations.add_noise(key, x, 0.1),
    ):
        changed = change(KEY, same)
        assert changed.shape == same.shape
        assert np.abs(changed[0] - changed[1]).max() > 1e-3

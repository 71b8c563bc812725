"""The size of JPEG files, against the files that Pillow writes."""

import io
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from alignprop_jax.errors import UserError
from alignprop_jax.rewards import make_reward
from alignprop_jax.rewards.file_size import jpeg_kilobytes
from alignprop_jax.rewards.jpeg_size import jpeg_bytes, quantization_table
from tests.rewards.varied_images import varied_images

QUALITIES = (50, 75, 95)


@pytest.fixture(scope="module")
def images():
    by_shape = defaultdict(list)
    for image in varied_images(504):
        by_shape[image.shape].append(image.astype(np.float32) / 255)
    assert len(by_shape) == 4
    return [np.stack(group) for group in by_shape.values()]


@pytest.mark.parametrize("quality", QUALITIES)
def test_tracks_the_size_of_real_files(images, quality):
    estimate = jax.jit(lambda batch: jpeg_bytes(batch, quality))
    estimated = np.concatenate([estimate(batch) for batch in images])
    real = np.concatenate([1000 * jpeg_kilobytes(quality)(batch, []) for batch in images])
    assert len(real) == 504
    assert real.max() > 50 * real.min()
    assert spearmanr(estimated, real).statistic >= 0.99
    ratio = estimated / real
    assert np.median(np.abs(ratio - 1)) < 0.05
    assert 0.85 < np.quantile(ratio, 0.02) < np.quantile(ratio, 0.98) < 1.2


@pytest.mark.parametrize("quality", [1, 30, *QUALITIES, 100])
def test_quantization_tables_are_those_in_the_file(quality):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    tables = Image.open(file).quantization
    np.testing.assert_array_equal(quantization_table(quality, chroma=False).ravel(), tables[0])
    np.testing.assert_array_equal(quantization_table(quality, chroma=True).ravel(), tables[1])


@pytest.mark.parametrize("quality", QUALITIES)
def test_gradient_is_that_of_finite_differences(quality):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        ramp = np.linspace(0, 1, 36)[:, None]
        image = jnp.asarray(0.4 + 0.2 * ramp + 0.1 * rng.uniform(-1, 1, (1, 20, 36, 3)))
        direction = jnp.asarray(rng.normal(size=image.shape))

        def along(step):
            return jpeg_bytes(image + step * direction, quality)[0]

        step = 1e-6
        expected = (along(step) - along(-step)) / (2 * step)
        actual = jax.grad(along)(0.0)
    assert abs(float(expected)) > 1
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_images_are_smallest_and_have_a_finite_gradient(value):
    flat = jnp.full((1, 24, 40, 3), value)
    size, gradient = jax.value_and_grad(lambda image: jpeg_bytes(image, 75)[0])(flat)
    assert np.isfinite(gradient).all()
    noisy = flat + 0.05 * jax.random.normal(jax.random.key(0), flat.shape)
    assert size < 0.5 * jpeg_bytes(noisy, 75)[0]


def test_detail_too_faint_to_be_coded_is_felt_before_it_is_seen():
    """A coefficient just below the rounding to 1 costs nothing in the file, but has a gradient."""
    wave = jnp.cos((2 * jnp.arange(16) + 1) * jnp.pi * 2 / 16)[:, None] * jnp.ones((16, 16))
    # Its one coefficient in a block is sqrt(8 * 8 / 2) amplitude.
    divisor = float(quantization_table(50, chroma=False)[2, 0])
    amplitude = 0.45 * divisor / 32**0.5 / 255

    def size(amplitude):
        gray = 0.5 + amplitude * wave
        return jpeg_bytes(jnp.stack([gray] * 3, axis=-1)[None], 50)[0]

    felt = jax.grad(size)(amplitude)
    assert felt > 10 * jax.grad(size)(0.1 * amplitude) > 0
    assert felt > 100


def test_rewards_are_kilobytes_with_opposite_signs(images):
    batch = images[0][:5]
    compress, incompress = (
        make_reward(name, None, {"jpeg": {"quality": 75}})
        for name in ("jpeg_compress", "jpeg_incompress")
    )
    expected = jpeg_bytes(batch, 75) / 1000
    for reward, sign in ((compress, -1), (incompress, 1)):
        inputs = reward.prepare(["a cat"] * 5)
        np.testing.assert_allclose(
            reward.score(reward.params, batch, inputs), sign * expected, rtol=1e-6
        )


def test_judge_counts_what_the_picture_adds_to_a_file():
    image = varied_images(5)[1]
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75)
    scan = file.getvalue().split(b"\xff\xda", 1)[1]
    scored = jpeg_kilobytes(75)(image[None].astype(np.float32) / 255, ["a cat"])
    # The scan's own header is 12 bytes long, the end-of-image marker 2.
    np.testing.assert_allclose(scored, [(len(scan) - 14) / 1000], rtol=1e-6)
    assert scored.dtype == np.float32


@pytest.mark.parametrize("quality", [0, 101])
def test_refuses_a_quality_that_does_not_exist(quality):
    with pytest.raises(UserError, match=f"jpeg_compress: quality {quality} must lie between"):
        make_reward("jpeg_compress", None, {"jpeg": {"quality": quality}})

import numpy as np
import pytest

from examples.emoji.captions import caption_words
from examples.emoji.degrade import defocus, degrade, melt, smear

WORDS = ("blurry", "faded", "noisy")
# Every pixel differs from its neighbours as much as can be.
CHECKERBOARD = np.repeat((np.indices((64, 64)).sum(0) % 2 * 255)[..., None], 3, -1).astype(np.uint8)
# Smooth, and far from black and white, so that noise is not cut.
GREY = np.full((64, 64, 3), 128, np.uint8)


def spoilt(image, word, number=8):
    """Pictures that were spoilt in the way of `word`."""
    found = []
    for seed in range(200):
        result, drawn = degrade(np.random.default_rng(seed), image)
        if drawn == word:
            found.append(result)
        if len(found) == number:
            return found
    raise AssertionError(f"{word} is never drawn")


def contrast(image):
    """Mean difference of a pixel to the next, as a share of the greatest."""
    return np.abs(np.diff(image.astype(float), axis=1)).mean() / 255


@pytest.mark.parametrize("word", WORDS)
def test_picture_keeps_its_shape_and_the_original_its_pixels(word):
    original = CHECKERBOARD.copy()
    for image in spoilt(original, word):
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        assert np.abs(image.astype(int) - original).mean() > 5
    np.testing.assert_array_equal(original, CHECKERBOARD)


def test_generator_alone_decides():
    for seed in range(12):
        image, word = degrade(np.random.default_rng(seed), CHECKERBOARD)
        again, word_again = degrade(np.random.default_rng(seed), CHECKERBOARD)
        np.testing.assert_array_equal(image, again)
        assert word == word_again


def test_every_way_is_as_frequent_and_its_word_is_in_the_vocabulary():
    rng = np.random.default_rng(0)
    drawn = [degrade(rng, GREY[:8, :8])[1] for _ in range(600)]
    assert set(drawn) == set(WORDS) <= set(caption_words())
    for word in WORDS:
        assert drawn.count(word) / 600 == pytest.approx(1 / 3, abs=0.06)


def blurred(how, image, number=8):
    return [how(np.random.default_rng(seed), image) for seed in range(number)]


def test_defocus_loses_detail_and_keeps_the_mean():
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 32:] = 255
    for image in blurred(defocus, CHECKERBOARD):
        assert contrast(image) < 0.02
        assert image.mean() == pytest.approx(CHECKERBOARD.mean(), abs=2)
    for image in blurred(defocus, half):
        # A sharp edge becomes a ramp that is several pixels wide.
        grey = (image[32, :, 0] > 25) & (image[32, :, 0] < 230)
        assert 3 <= grey.sum() <= 20


def test_smear_makes_a_line_of_a_dot():
    dot = np.zeros((64, 64, 3), np.uint8)
    dot[31:33, 31:33] = 255
    for image in blurred(smear, dot):
        rows, columns = np.nonzero(image[..., 0] > 8)
        assert 0.1 * 64 - 3 < np.hypot(np.ptp(rows), np.ptp(columns)) < 0.3 * 64 + 4
        assert image.sum() == pytest.approx(dot.sum(), rel=0.15)
        # All of it is near one line through the middle.
        spread = np.linalg.svd(np.stack([rows, columns]) - 31.5, compute_uv=False)
        assert spread[1] < 1.2 * len(rows) ** 0.5


def test_melt_moves_pixels_smoothly():
    ramp = np.broadcast_to(4 * np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3))
    for image in blurred(melt, ramp):
        shift = image[..., 0] / 4 - np.arange(64)
        inner = shift[8:-8, 8:-8]
        assert 0.5 < inner.std() and np.abs(inner).max() < 40
        assert np.abs(np.diff(inner, axis=0)).max() < 4
    for image in blurred(melt, GREY):
        np.testing.assert_array_equal(image, GREY)


def test_faded_loses_at_least_a_third_of_the_contrast_to_a_bright_wash():
    for image in spoilt(CHECKERBOARD, "faded"):
        assert contrast(image) < 0.66
        # The share of the wash is the same everywhere, and the wash is smooth.
        steps = np.abs(np.diff(image.astype(float), axis=1))
        assert steps.std() < 8
        strength = 1 - contrast(image)
        wash = (image.astype(float) - CHECKERBOARD * (1 - strength)) / strength
        assert 85 < wash.min() and wash.max() < 260


def test_noisy_adds_noise_in_squares():
    sides = set()
    for image in spoilt(GREY, "noisy", number=20):
        assert 15 < image.astype(float).std() < 75
        assert image.mean() == pytest.approx(128, abs=8)
        steps_at_column = np.abs(np.diff(image.astype(int), axis=1)).sum(axis=(0, 2))
        side = int(np.flatnonzero(steps_at_column)[0]) + 1
        assert set(np.flatnonzero(steps_at_column) + 1) == set(range(side, 64, side))
        sides.add(side)
    assert sides == {1, 2, 4}

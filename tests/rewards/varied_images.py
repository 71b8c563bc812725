"""Pictures of many kinds, made from a seed, for rewards that have to order all of them."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_SIZES = ((64, 64), (96, 80), (50, 71), (128, 128))


def varied_images(number: int, seed: int = 0) -> list[np.ndarray]:
    """`number` pictures, uint8 [H, W, 3] of several sizes, each kind at each size."""
    rng = np.random.default_rng(seed)
    kinds = (_gradient, _noise, _smooth_noise, _shapes, _text, _stripes, _blend)
    return [
        np.clip(kinds[index % len(kinds)](rng, *_SIZES[index % len(_SIZES)]), 0, 255).astype(
            np.uint8
        )
        for index in range(number)
    ]


def _gradient(rng, height, width):
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j][..., None]
    start, right, down = rng.uniform(0, 255, (3, 3))
    return start + x * (right - start) + y * (down - start) + rng.normal(0, rng.uniform(0, 3))


def _noise(rng, height, width):
    strength = np.exp(rng.uniform(0, 4.5))
    channels = 3 if rng.random() < 0.5 else 1
    return rng.uniform(50, 200, 3) + strength * rng.normal(size=(height, width, channels))


def _smooth_noise(rng, height, width):
    """Amplitude falls with frequency to a random power, as photographs' does with power 1."""
    y, x = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    frequency = np.hypot(y, x)
    frequency[0, 0] = np.inf
    spectrum = np.fft.fft2(rng.normal(size=(3, height, width))) * frequency ** -rng.uniform(0.5, 2)
    picture = np.moveaxis(np.fft.ifft2(spectrum).real, 0, -1)
    mix = np.eye(3) * rng.uniform(0, 1) + rng.uniform(0, 1)
    picture = picture @ mix
    return 128 + picture / picture.std() * rng.uniform(5, 70)


def _shapes(rng, height, width):
    """Flat shapes on white, as emoji are."""
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 14)):
        left, top = rng.uniform(0, 0.8, 2) * (width, height)
        right, bottom = (left, top) + rng.uniform(2, 0.6 * width, 2)
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.6 else draw.rectangle)((left, top, right, bottom), color)
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 4)))
    return np.asarray(picture, np.float64)


def _text(rng, height, width):
    background, ink = (tuple(int(value) for value in rng.integers(0, 256, 3)) for _ in range(2))
    picture = Image.new("RGB", (width, height), background)
    draw = ImageDraw.Draw(picture)
    for line in range(rng.integers(1, height // 12)):
        draw.text((2, 12 * line), "".join(map(chr, rng.integers(65, 123, 24))), ink)
    return np.asarray(picture, np.float64)


def _stripes(rng, height, width):
    y, x = np.mgrid[:height, :width]
    wave = np.sin(rng.uniform(0.02, 2.5) * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)))
    if rng.random() < 0.5:
        wave = np.sign(wave)
    return rng.uniform(60, 190, 3) + wave[..., None] * rng.uniform(0, 90, 3)


def _blend(rng, height, width):
    share = rng.uniform(0.1, 0.9)
    first, second = (
        (_shapes, _smooth_noise, _text, _stripes)[kind](rng, height, width)
        for kind in rng.choice(4, 2, replace=False)
    )
    return share * first + (1 - share) * second

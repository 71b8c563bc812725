"""Scenes of plain discs, so that no test needs the emoji: flat ones are red, glossy ones blue."""

import numpy as np

from examples.emoji.scenes import SceneSampler
from examples.emoji.sprites import Sprites

NAMES = ("ant", "cat", "grapes", "kiwi")


def make_sprites() -> Sprites:
    y, x = np.mgrid[:64, :64] - 31.5
    images = np.zeros((2 * len(NAMES), 64, 64, 4), np.uint8)
    images[..., 3] = np.where(x**2 + y**2 < 30**2, 255, 0)
    images[: len(NAMES), ..., 0] = 220
    images[len(NAMES) :, ..., 2] = 220
    return Sprites(images, NAMES * 2, ("flat",) * len(NAMES) + ("glossy",) * len(NAMES))


def make_scenes(mixture=None) -> SceneSampler:
    return SceneSampler(make_sprites(), mixture)

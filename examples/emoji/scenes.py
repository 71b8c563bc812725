"""Random pictures of emoji with captions, made on the fly from the sprites."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from alignprop_jax.prompts.built_in import ANIMALS, ANIMALS_UNSEEN
from alignprop_jax.prompts.english import is_countable
from examples.emoji.captions import caption
from examples.emoji.colors import COLORS, tint
from examples.emoji.names import STYLES
from examples.emoji.sprites import Sprites

IMAGE_SIZE = 64
_HALF = IMAGE_SIZE // 2
_COLOR_WORDS = tuple(COLORS)

# Cells (left, top, width, height) that keep the objects of a scene apart, in reading order.
_ROW = ((0, 8, _HALF, 48), (_HALF, 8, _HALF, 48))
_PYRAMID = ((16, 0, _HALF, _HALF), (0, _HALF, _HALF, _HALF), (_HALF, _HALF, _HALF, _HALF))
_FUNNEL = ((0, 0, _HALF, _HALF), (_HALF, 0, _HALF, _HALF), (16, _HALF, _HALF, _HALF))
_SQUARE = (*_FUNNEL[:2], *_PYRAMID[1:])
_LAYOUTS = {2: (_ROW,), 3: (_PYRAMID, _FUNNEL), 4: (_SQUARE,)}


@dataclasses.dataclass(frozen=True)
class SceneMixture:
    """What is drawn how often. The weights of the kinds are relative to their sum.

    Attributes:
      single: one object in its natural colours on white, "a cat".
      count: two to four of a kind, "three dogs".
      pair: two kinds side by side, "a cat and a dog".
      colored: "a red cat".
      on_background: "a cat on a blue background".
      colored_on_background: "a red cat on a blue background".
      colored_pair: "a red cat and a blue dog".
      featured: names drawn more often than the others: the animals of the built-in prompts.
      featured_share: of the `single` pictures, the share that show a featured name.
      featured_share_of_scenes: the same for objects of every other kind.
      glossy_share: the share of scenes in the glossy style.
      single_size: least and greatest width in pixels of an object that is alone.
      scene_size: the same for each of several objects; at most 32.
      misstated_share: of the `count` scenes, the share whose caption states a number at random.
      max_shift: how far an object that is alone may be off the middle, in pixels.
    """

    single: float = 0.75
    count: float = 0.09
    pair: float = 0.05
    colored: float = 0.05
    on_background: float = 0.03
    colored_on_background: float = 0.015
    colored_pair: float = 0.015
    featured: tuple[str, ...] = (*ANIMALS, *ANIMALS_UNSEEN)
    featured_share: float = 0.75
    featured_share_of_scenes: float = 0.85
    glossy_share: float = 0.5
    single_size: tuple[int, int] = (50, 62)
    scene_size: tuple[int, int] = (26, 32)
    misstated_share: float = 0.0
    max_shift: int = 3


_KINDS = (
    "single",
    "count",
    "pair",
    "colored",
    "on_background",
    "colored_on_background",
    "colored_pair",
)


class Scene(NamedTuple):
    """A picture, its caption and what the caption was made from.

    Attributes:
      image: uint8 [64, 64, 3].
      caption: English without a word on style; its number may be wrong, see `misstated_share`.
      factors: `kind` (a weight of `SceneMixture`), `style`, `names`, `count` (objects in all),
        `colors` (for each name a colour word or None), `background` (colour word or None) and
        `boxes` (for each object, those of the first name first, left, top and edge in pixels).
    """

    image: np.ndarray
    caption: str
    factors: dict


class SceneSampler:
    """Draws scenes; the same numpy generator state gives the same scene."""

    def __init__(self, sprites: Sprites, mixture: SceneMixture | None = None):
        self._sprites = sprites
        self._mixture = mixture or SceneMixture()
        names = sprites.unique_names
        self._names = _split_by_membership(names, self._mixture.featured)
        countable = [name for name in names if is_countable(name)]
        self._countable_names = _split_by_membership(countable, self._mixture.featured)
        weights = np.array([getattr(self._mixture, kind) for kind in _KINDS], np.float64)
        self._kind_probabilities = weights / weights.sum()

    def batch(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[str]]:
        """Draws `size` scenes.

        Returns:
          Images, uint8 [size, 64, 64, 3], and their captions.
        """
        scenes = [self.scene(rng) for _ in range(size)]
        return np.stack([scene.image for scene in scenes]), [scene.caption for scene in scenes]

    def scene(self, rng: np.random.Generator) -> Scene:
        """Draws one scene."""
        kind = _KINDS[rng.choice(len(_KINDS), p=self._kind_probabilities)]
        style = STYLES[int(rng.random() < self._mixture.glossy_share)]
        names = self._draw_names(rng, kind)
        count = int(rng.integers(2, 5)) if kind == "count" else 1
        palette = [_COLOR_WORDS[index] for index in rng.permutation(len(_COLOR_WORDS))]
        colors = tuple(palette.pop() if kind.startswith("colored") else None for _ in names)
        background = palette.pop() if kind.endswith("on_background") else None

        pictures = []
        for name, color in zip(names, colors, strict=True):
            picture = self._draw_picture(rng, name, style)
            pictures += [picture if color is None else tint(picture, color)] * count
        canvas = _white_canvas()
        if background is not None:
            canvas[:] = _vary(rng, COLORS[background])
        if len(pictures) == 1:
            boxes = [self._place_alone(rng, canvas, pictures[0])]
        else:
            boxes = self._place_in_cells(rng, canvas, pictures)

        factors = {
            "kind": kind,
            "style": style,
            "names": names,
            "count": len(pictures),
            "colors": colors,
            "background": background,
            "boxes": boxes,
        }
        stated = count
        if kind == "count" and rng.random() < self._mixture.misstated_share:
            stated = int(rng.integers(2, 5))
        return Scene(canvas, caption(names, stated, colors, background), factors)

    def single(self, rng: np.random.Generator, name: str, style: str) -> np.ndarray:
        """A picture of one object in its natural colours on white, uint8 [64, 64, 3]."""
        canvas = _white_canvas()
        self._place_alone(rng, canvas, self._draw_picture(rng, name, style))
        return canvas

    def _draw_names(self, rng: np.random.Generator, kind: str) -> tuple[str, ...]:
        mixture = self._mixture
        featured, others = self._countable_names if kind == "count" else self._names
        share = mixture.featured_share if kind == "single" else mixture.featured_share_of_scenes
        number = 2 if kind.endswith("pair") else 1
        drawn: list[str] = []
        for _ in range(number):
            group = (featured or others) if rng.random() < share else (others or featured)
            choices = [name for name in group if name not in drawn]
            drawn.append(choices[rng.integers(len(choices))])
        return tuple(drawn)

    def _draw_picture(self, rng: np.random.Generator, name: str, style: str) -> np.ndarray:
        indices = self._sprites.by_name_and_style[name, style]
        return self._sprites.images[indices[rng.integers(len(indices))]]

    def _place_alone(
        self, rng: np.random.Generator, canvas: np.ndarray, picture: np.ndarray
    ) -> tuple[int, int, int]:
        low, high = self._mixture.single_size
        size = int(rng.integers(low, high + 1))
        margin = IMAGE_SIZE - size
        shift = rng.integers(-self._mixture.max_shift, self._mixture.max_shift + 1, size=2)
        left, top = np.clip(margin // 2 + shift, 0, margin)
        _paste(canvas, _resized(picture, size, flip=rng.random() < 0.5), left, top)
        return int(left), int(top), size

    def _place_in_cells(
        self, rng: np.random.Generator, canvas: np.ndarray, pictures: Sequence[np.ndarray]
    ) -> list[tuple[int, int, int]]:
        low, high = self._mixture.scene_size
        size = int(rng.integers(low, high + 1))
        layouts = _LAYOUTS[len(pictures)]
        cells = layouts[rng.integers(len(layouts))]
        boxes = []
        for picture, (left, top, width, height) in zip(pictures, cells, strict=True):
            left += rng.integers(0, width - size + 1)
            top += rng.integers(0, height - size + 1)
            _paste(canvas, _resized(picture, size, flip=rng.random() < 0.5), left, top)
            boxes.append((int(left), int(top), size))
        return boxes


def _split_by_membership(
    names: Sequence[str], featured: Collection[str]
) -> tuple[list[str], list[str]]:
    """The names that are in `featured`, and the others."""
    members = [name for name in names if name in featured]
    return members, [name for name in names if name not in featured]


def _white_canvas() -> np.ndarray:
    return np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 255, np.uint8)


def _vary(rng: np.random.Generator, color: tuple[int, int, int]) -> np.ndarray:
    return np.clip(np.array(color) + rng.integers(-10, 11, size=3), 0, 255)


def _resized(picture: np.ndarray, size: int, flip: bool) -> np.ndarray:
    """RGBA in, premultiplied RGBA of `size` by `size` pixels out, uint8."""
    image = Image.fromarray(picture).convert("RGBa")
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[:, ::-1] if flip else pixels


def _paste(canvas: np.ndarray, premultiplied: np.ndarray, left: int, top: int) -> None:
    height, width = premultiplied.shape[:2]
    target = canvas[top : top + height, left : left + width]
    transparency = 255 - premultiplied[..., 3:].astype(np.uint16)
    behind = (target * transparency + 127) // 255
    target[:] = np.minimum(premultiplied[..., :3] + behind, 255)

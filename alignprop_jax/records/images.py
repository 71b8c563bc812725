"""Pictures for people: labelled grids as PNG."""

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from alignprop_jax.loading.whole_file import whole_file
from alignprop_jax.rewards.pixels import to_uint8

_SMALLEST, _LARGEST = 96, 256  # pixels across a tile: labels stay legible, files small
_MARGIN = 6
_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)


def make_grid(images: np.ndarray, labels: list[str], columns: int) -> Image.Image:
    """Lays images [N, H, W, 3] out row by row, each with its label below.

    Bytes are taken as they are, floats as values in [0, 1].
    """
    tiles = [_tile(image) for image in (images if images.dtype == np.uint8 else to_uint8(images))]
    font = ImageFont.load_default()
    line = sum(font.getmetrics()) + 2
    width, height = tiles[0].width + _MARGIN, tiles[0].height + line + _MARGIN
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for index, (tile, label) in enumerate(zip(tiles, labels, strict=True)):
        left = _MARGIN + index % columns * width
        top = _MARGIN + index // columns * height
        grid.paste(tile, (left, top))
        draw.text((left, top + tile.height), _shorten(label, tile.width, font), _INK, font)
    return grid


def make_comparison(before: np.ndarray, after: np.ndarray, labels: list[str]) -> Image.Image:
    """Lays pairs out side by side, before on the left, from images [N, H, W, 3]."""
    pairs = np.stack([before, after], axis=1).reshape(-1, *before.shape[1:])
    captions = [f"{when}: {label}" for label in labels for when in ("before", "after")]
    return make_grid(pairs, captions, 2 * columns_for(len(labels), most=4))


def columns_for(count: int, most: int = 9) -> int:
    """Returns how many columns make a grid of `count` tiles about as wide as it is high."""
    return max(1, min(most, count, round(count**0.5 + 0.5)))


def save_images(folder: Path, images: np.ndarray, prompts: list[str]) -> None:
    """Writes images [N, H, W, 3] as folder/0000_a_cat.png, 0001_a_dog.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (image, prompt) in enumerate(zip(to_uint8(images), prompts, strict=True)):
        name = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60]
        with whole_file(folder / f"{index:04d}_{name}.png") as file:
            Image.fromarray(image).save(file, "PNG")


def _tile(image: np.ndarray) -> Image.Image:
    tile = Image.fromarray(image)
    if tile.width < _SMALLEST:
        factor = -(-_SMALLEST // tile.width)
        return tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)
    if tile.width > _LARGEST:
        height = max(1, round(tile.height * _LARGEST / tile.width))
        return tile.resize((_LARGEST, height), Image.Resampling.LANCZOS)
    return tile


def _shorten(label: str, width: int, font: ImageFont.ImageFont) -> str:
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(label + "...") > width:
        label = label[:-1]
    return label + "..."

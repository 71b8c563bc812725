import numpy as np
import pytest
from PIL import Image

from alignprop_jax.records.images import (
    columns_for,
    make_comparison,
    make_grid,
    save_images,
)
from alignprop_jax.rewards.pixels import to_uint8


def flat(*levels, size=32):
    return np.stack([np.full((size, size, 3), level, np.float32) for level in levels])


def count(grid, colour):
    return int(np.all(np.asarray(grid) == colour, axis=-1).sum())


def test_bytes_round_and_clip():
    values = np.array([-1.0, 0.0, 0.5, 1.0, 2.0, np.nan])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255, 0]


def test_grid_shows_every_tile_enlarged_with_a_label():
    grid = make_grid(flat(0.2, 0.4, 0.6), ["", "", ""], columns=2)
    # Tiles of 32 pixels are enlarged to 96 by whole factors, which keeps their colour exact.
    for level in (51, 102, 153):
        assert count(grid, level) == 96 * 96
    plain = np.asarray(make_grid(flat(1.0, 1.0), ["", "two"], columns=2))
    darkest = plain.min(axis=(0, 2))
    assert darkest[: 96 + 6].min() == 255 and darkest[96 + 6 :].min() < 100


def test_large_tiles_are_reduced():
    grid = make_grid(flat(0.2, size=512), [""], columns=1)
    assert count(grid, 51) == 256 * 256


def test_a_label_never_leaves_its_tile():
    short = make_grid(flat(1.0, 1.0), ["x", "x"], columns=2)
    long = make_grid(flat(1.0, 1.0), ["x" * 500, "x"], columns=2)
    middle = 96 + 6 + 6 // 2
    assert short.size == long.size
    assert np.array_equal(np.asarray(short)[:, middle:], np.asarray(long)[:, middle:])


def test_comparison_has_before_left_of_after():
    before, after = flat(0.2, 0.4), flat(0.6, 0.8)
    grid = np.asarray(make_comparison(before, after, ["a cat", "a dog"]))
    centre = grid[6 + 48, :, 0]
    order = [level for level in (51, 102, 153, 204) if level in centre]
    positions = [int(np.argmax(centre == level)) for level in (51, 153)]
    assert 51 in order and 153 in order and positions[0] < positions[1]


@pytest.mark.parametrize("number, columns", [(1, 1), (4, 2), (6, 3), (45, 7), (500, 9)])
def test_columns(number, columns):
    assert columns_for(number) == columns


def test_files_are_in_the_order_of_the_prompts(tmp_path):
    save_images(tmp_path / "out", flat(0.2, 0.4), ["A cat, sitting!", "../dog"])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["0000_a_cat_sitting.png", "0001_dog.png"]
    assert Image.open(tmp_path / "out" / names[1]).getpixel((0, 0)) == (102, 102, 102)

import collections
import dataclasses

import numpy as np
import pytest

from examples.emoji.captions import caption
from examples.emoji.colors import COLORS, tint
from examples.emoji.scenes import SceneMixture, SceneSampler
from examples.emoji.sprites import Sprites

ONLY = {
    field.name: 0.0 for field in dataclasses.fields(SceneMixture) if field.type in (float, "float")
} | {"featured_share": 0.5, "featured_share_of_scenes": 0.5, "glossy_share": 0.5}


def only(kind, **settings):
    return SceneMixture(**(ONLY | {kind: 1.0} | settings))


@pytest.fixture(scope="module")
def sprites():
    """Opaque green squares with a dark left half, so that a flip shows; the glossy are bluer."""
    names = ("ant", "cat", "grapes", "kiwi")
    images = np.zeros((8, 64, 64, 4), np.uint8)
    images[..., 1], images[..., 3] = 200, 255
    images[4:, ..., 2] = 150
    images[:, :, :32, :3] //= 4
    return Sprites(images, names * 2, ("flat",) * 4 + ("glossy",) * 4)


def test_scenes_depend_on_the_generator_alone(sprites):
    sampler = SceneSampler(sprites)
    images, captions = sampler.batch(np.random.default_rng(3), 40)
    again, captions_again = SceneSampler(sprites).batch(np.random.default_rng(3), 40)
    assert images.shape == (40, 64, 64, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, again)
    assert captions == captions_again
    other, _ = sampler.batch(np.random.default_rng(4), 40)
    assert (images != other).any()


def test_frequencies_are_those_of_the_mixture(sprites):
    mixture = only("single", count=1.0, featured=("cat",), featured_share=0.8, glossy_share=0.25)
    sampler = SceneSampler(sprites, mixture)
    rng = np.random.default_rng(0)
    factors = [sampler.scene(rng).factors for _ in range(2000)]
    kinds = collections.Counter(factor["kind"] for factor in factors)
    assert set(kinds) == {"single", "count"}
    assert kinds["count"] / 2000 == pytest.approx(0.5, abs=0.04)
    styles = collections.Counter(factor["style"] for factor in factors)
    assert styles["glossy"] / 2000 == pytest.approx(0.25, abs=0.04)
    names = collections.Counter(f["names"][0] for f in factors if f["kind"] == "single")
    assert names["cat"] / kinds["single"] == pytest.approx(0.8, abs=0.05)
    assert names["ant"] / kinds["single"] == pytest.approx(0.2 / 3, abs=0.03)
    assert all(f["names"] != ("grapes",) for f in factors if f["kind"] == "count")


@pytest.mark.parametrize("kind", ["count", "pair", "colored", "on_background", "colored_pair"])
def test_caption_tells_what_the_factors_hold(sprites, kind):
    sampler = SceneSampler(sprites, only(kind))
    rng = np.random.default_rng(1)
    for _ in range(20):
        _, text, factors = sampler.scene(rng)
        count = factors["count"] if kind == "count" else 1
        assert text == caption(factors["names"], count, factors["colors"], factors["background"])
        assert len(set(factors["names"])) == len(factors["names"])
        assert "flat" not in text and "glossy" not in text


def test_a_share_of_the_captions_misstates_the_number(sprites):
    sampler = SceneSampler(sprites, only("count", misstated_share=0.6))
    rng = np.random.default_rng(1)
    scenes = [sampler.scene(rng) for _ in range(200)]
    right = [caption(s.factors["names"], s.factors["count"]) == s.caption for s in scenes]
    # A number at random is right once in three.
    assert 0.5 < np.mean(right) < 0.7


def test_objects_of_a_scene_are_apart_and_as_many_as_told(sprites):
    # At the greatest size objects touch, so one pixel less separates them.
    sampler = SceneSampler(sprites, only("count", scene_size=(26, 31)))
    rng = np.random.default_rng(2)
    counts, tops, lefts = set(), set(), set()
    for _ in range(30):
        image, _, factors = sampler.scene(rng)
        covered = (image != 255).any(axis=-1)
        side = np.sqrt(covered.sum() / factors["count"])
        assert side == pytest.approx(round(side))
        assert 26 <= side <= 31
        counts.add(factors["count"])
        tops.add(int(covered.any(axis=1).argmax()))
        lefts.add(int(covered.any(axis=0).argmax()))
    assert counts == {2, 3, 4}
    assert min(len(tops), len(lefts)) > 3


def test_single_object_stays_inside_and_is_flipped_shifted_and_scaled(sprites):
    sampler = SceneSampler(sprites, only("single", single_size=(50, 62), max_shift=3))
    rng = np.random.default_rng(5)
    boxes, dark_sides = set(), set()
    for _ in range(60):
        image = sampler.single(rng, "cat", "flat")
        rows, columns = np.nonzero((image != 255).any(axis=-1))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert height == width
        assert 50 <= width <= 62
        assert abs(columns.min() - (64 - width) // 2) <= 3
        boxes.add((int(width), int(rows.min()), int(columns.min())))
        dark_sides.add(bool(image[32, 12, 1] < image[32, 52, 1]))
    assert len(boxes) > 30
    assert dark_sides == {True, False}


def test_all_objects_of_a_scene_share_the_style(sprites):
    sampler = SceneSampler(sprites, only("pair"))
    rng = np.random.default_rng(6)
    for _ in range(20):
        image, _, factors = sampler.scene(rng)
        blue_of_bright_half = {"flat": 0, "glossy": 150}[factors["style"]]
        bright = (image[..., 1] == 200) & (image[..., 0] == 0)
        np.testing.assert_array_equal(image[bright][:, 2], blue_of_bright_half)


def test_transparent_pixels_show_the_background(sprites):
    faint = sprites.images.copy()
    faint[..., 3] = 128
    sampler = SceneSampler(
        dataclasses.replace(sprites, images=faint), only("on_background", max_shift=0)
    )
    image, _, factors = sampler.scene(np.random.default_rng(7))
    background = image[0, 0].astype(int)
    assert np.abs(background - COLORS[factors["background"]]).max() <= 10
    halves = faint[0 if factors["style"] == "flat" else 4, 0, [0, 63], :3].astype(int)
    expected = np.sort(halves * 128 + background * 127, axis=0) / 255
    middle = np.sort(image[32, [20, 44]].astype(int), axis=0)
    np.testing.assert_allclose(middle, expected, atol=1.5)


def test_tint_keeps_alpha_and_light_order_and_takes_on_the_hue():
    lightness = np.linspace(30, 220, 64).astype(np.uint8)
    sprite = np.broadcast_to(lightness[None, :, None], (64, 64, 4)).copy()
    sprite[..., 3] = np.arange(64)[:, None] * 4
    for color, target in COLORS.items():
        tinted = tint(sprite, color)
        np.testing.assert_array_equal(tinted[..., 3], sprite[..., 3])
        assert (np.diff(tinted[0, :, :3].astype(int), axis=0) >= 0).all()
        assert np.abs(tinted[..., :3].astype(int) - target).max(axis=-1).min() <= 6


def test_tint_stretches_pale_and_dark_pictures_alike():
    ramp = np.linspace(0, 40, 64).astype(np.uint8)
    dark = np.full((64, 64, 4), 255, np.uint8)
    dark[..., :3] = ramp[None, :, None]
    pale = dark.copy()
    pale[..., :3] += 200
    np.testing.assert_allclose(tint(dark, "red"), tint(pale, "red"), atol=2)

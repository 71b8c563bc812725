import json

import numpy as np
import pytest
from PIL import Image

from alignprop_jax.errors import UserError
from examples.emoji.emoji_dataset import prepare, read_examples
from examples.emoji.sprites import load_sprites

EMOJI = [
    ("Dog Face", "1F436", "Animals & Nature"),
    ("Dog", "1F415", "Animals & Nature"),
    ("Hot Pepper", "1F336-FE0F", "Food & Drink"),
    ("Paw Prints", "1F43E", "Animals & Nature"),
    ("Grinning Face", "1F600", "Smileys & Emotion"),
]


@pytest.fixture
def packages(tmp_path):
    """Both packages in miniature: flat art is a red square, glossy a red disc in clear green."""
    flat = tmp_path / "google/package/img/google/64"
    glossy = tmp_path / "fluent/package/assets"
    flat.mkdir(parents=True)
    glossy.mkdir(parents=True)
    y, x = np.mgrid[:256, :256] - 127.5
    disc = np.where((x**2 + y**2 < 100**2)[..., None], [255, 0, 0, 255], [0, 255, 0, 0])
    entries = []
    for name, unified, category in EMOJI:
        image = f"{unified.lower()}.png"
        Image.new("RGBA", (64, 64), (255, 0, 0, 255)).save(flat / image)
        Image.fromarray(disc.astype(np.uint8)).save(
            glossy / f"{unified.lower()}.webp", lossless=True, exact=True
        )
        entries.append({"name": name, "unified": unified, "image": image, "category": category})
    (tmp_path / "google/package/emoji.json").write_text(json.dumps(entries))
    return tmp_path


def test_examples_of_the_prepared_data_set(packages, tmp_path):
    prepare(packages, tmp_path / "data")
    examples = read_examples(tmp_path / "data")
    labels = [(e["name"], e["style"], e["category"], e["codepoint"]) for e in examples]
    assert labels == [
        ("pepper", "flat", "Food & Drink", "1f336-fe0f"),
        ("pepper", "glossy", "Food & Drink", "1f336-fe0f"),
        ("dog", "flat", "Animals & Nature", "1f415"),
        ("dog", "glossy", "Animals & Nature", "1f415"),
        ("dog", "flat", "Animals & Nature", "1f436"),
        ("dog", "glossy", "Animals & Nature", "1f436"),
    ]
    for example in examples:
        assert example["image"].shape == (64, 64, 4)
        assert example["image"].dtype == np.uint8
    np.testing.assert_array_equal(examples[0]["image"], np.full((64, 64, 4), [255, 0, 0, 255]))

    sprites = load_sprites(tmp_path / "data")
    assert sprites.unique_names == ("dog", "pepper")
    assert sprites.by_name_and_style["dog", "glossy"] == (3, 5)


def test_clear_surroundings_do_not_bleed_into_the_shrunk_picture(packages, tmp_path):
    prepare(packages, tmp_path / "data")
    glossy = read_examples(tmp_path / "data")[1]["image"]
    edge = (glossy[..., 3] > 8) & (glossy[..., 3] < 247)
    assert edge.sum() > 50
    assert glossy[edge][:, 1].max() == 0
    assert glossy[32, 32].tolist() == [255, 0, 0, 255]
    assert glossy[0, 0, 3] == 0


def test_preparing_again_keeps_what_is_there(packages, tmp_path):
    prepare(packages, tmp_path / "data")
    prepare("no/such/folder", tmp_path / "data")
    assert len(read_examples(tmp_path / "data")) == 6


def test_missing_packages_pictures_and_data_are_named(packages, tmp_path):
    with pytest.raises(UserError, match=r"emoji\.json.*fetch_data"):
        prepare(tmp_path / "nowhere", tmp_path / "data")
    with pytest.raises(UserError, match="no emoji data set in .*data"):
        load_sprites(tmp_path / "data")
    (packages / "fluent/package/assets/1f415.webp").unlink()
    with pytest.raises(UserError, match=r"1f415\.webp.*fetch_data"):
        prepare(packages, tmp_path / "data")

"""The emoji data set: two openly licensed sets of pictures as one tensorflow-datasets builder."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from alignprop_jax.errors import UserError
from examples.emoji.names import PLAIN_NAMES, STYLES

IMAGE_SIZE = 64
CATEGORIES = ("Animals & Nature", "Food & Drink")

_GOOGLE = Path("google", "package")
_FLUENT = Path("fluent", "package")
_HINT = "unpack both sets with: bash examples/emoji/fetch_data.sh FOLDER"


class EmojiDataset(tfds.core.GeneratorBasedBuilder):
    """One example for each emoji and style.

    Features: `image` uint8 [64, 64, 4] (RGBA, alpha not premultiplied), `name` (plain English,
    shared by pictures of the same thing), `style` (flat: Noto; glossy: Fluent 3D), `category` (of
    the Unicode list) and `codepoint` (hexadecimal, joined by hyphens). Needs no TensorFlow: read it
    with `as_data_source`.
    """

    name = "emoji"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = _HINT
    # Nothing is downloaded, so there are no checksums; looking for some needs a package that
    # tensorflow-datasets does not require.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Emoji of animals, nature, food and drink in a flat and a glossy style.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(IMAGE_SIZE, IMAGE_SIZE, 4), encoding_format="png"
                    ),
                    "name": tfds.features.Text(),
                    "style": tfds.features.ClassLabel(names=STYLES),
                    "category": tfds.features.Text(),
                    "codepoint": tfds.features.Text(),
                }
            ),
            homepage="https://github.com/iamcal/emoji-data",
            license="Noto Emoji: Apache-2.0; Fluent Emoji: MIT",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, folder: Path) -> Iterator[tuple[str, dict]]:
        for entry in read_emoji_list(folder):
            codepoint = entry["unified"].lower()
            pictures = {
                "flat": folder / _GOOGLE / "img" / "google" / str(IMAGE_SIZE) / entry["image"],
                "glossy": folder / _FLUENT / "assets" / f"{codepoint}.webp",
            }
            for style, path in pictures.items():
                yield (
                    f"{codepoint}_{style}",
                    {
                        "image": _read_picture(path),
                        "name": PLAIN_NAMES[entry["name"].lower()],
                        "style": style,
                        "category": entry["category"],
                        "codepoint": codepoint,
                    },
                )


def read_emoji_list(folder: Path) -> list[dict]:
    """The entries of `emoji.json` that belong to the data set.

    Args:
      folder: where `examples/emoji/fetch_data.sh` has put both packages.

    Raises:
      UserError: the list is not there.
    """
    path = folder / _GOOGLE / "emoji.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no emoji list at {path}; {_HINT}") from None
    return [
        entry
        for entry in entries
        if entry["category"] in CATEGORIES and entry["name"].lower() in PLAIN_NAMES
    ]


def _read_picture(path: Path) -> Image.Image:
    try:
        picture = Image.open(path).convert("RGBA")
    except OSError as error:
        raise UserError(f"no picture can be read at {path}; {_HINT}") from error
    size = (IMAGE_SIZE, IMAGE_SIZE)
    # Pillow weighs by alpha here, so the colour of clear pixels does not bleed into the edge.
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def prepare(manual_dir: str | Path, data_dir: str | Path) -> EmojiDataset:
    """Builds the data set under `data_dir` from the packages in `manual_dir`, unless it is there.

    Raises:
      UserError: a package is not in `manual_dir`, or a picture of it is absent or broken.
    """
    builder = EmojiDataset(data_dir=data_dir, file_format="array_record")
    if builder.info.splits:
        return builder
    read_emoji_list(Path(manual_dir))
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=Path(manual_dir))
    )
    return builder


def read_examples(data_dir: str | Path) -> list[dict]:
    """All examples of the prepared data set, in an order that does not depend on the machine.

    Returns:
      Dicts of `image` (uint8 [64, 64, 4]), `name`, `style`, `category` and `codepoint`.

    Raises:
      UserError: nothing is prepared under `data_dir`.
    """
    builder = EmojiDataset(data_dir=data_dir, file_format="array_record")
    if not builder.info.splits:
        raise UserError(f"no emoji data set in {data_dir}; prepare it from the packages first")
    examples = [
        {
            "image": np.asarray(example["image"]),
            "style": STYLES[example["style"]],
            **{key: _text(example[key]) for key in ("name", "category", "codepoint")},
        }
        for example in builder.as_data_source(split="train")
    ]
    return sorted(examples, key=lambda example: (example["codepoint"], example["style"]))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value

"""The pictures of the emoji data set in memory, found by name and style."""

import dataclasses
from functools import cached_property
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Sprites:
    """Pictures with what they show.

    Attributes:
      images: uint8 [N, 64, 64, 4], RGBA, alpha not premultiplied.
      names: N plain names; several pictures may share one.
      styles: N times "flat" or "glossy".
    """

    images: np.ndarray
    names: tuple[str, ...]
    styles: tuple[str, ...]

    @cached_property
    def by_name_and_style(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(name, style) -> indices of the pictures."""
        found: dict[tuple[str, str], list[int]] = {}
        for index, key in enumerate(zip(self.names, self.styles, strict=True)):
            found.setdefault(key, []).append(index)
        return {key: tuple(indices) for key, indices in found.items()}

    @cached_property
    def unique_names(self) -> tuple[str, ...]:
        """Every name once, sorted."""
        return tuple(sorted(set(self.names)))


def load_sprites(data_dir: str | Path) -> Sprites:
    """Reads the data set prepared under `data_dir` (`emoji_dataset.prepare`).

    Raises:
      UserError: nothing is prepared there.
    """
    # Imported here: tensorflow-datasets takes seconds to import and only this function needs it.
    from examples.emoji.emoji_dataset import read_examples

    examples = read_examples(data_dir)
    return Sprites(
        images=np.stack([example["image"] for example in examples]),
        names=tuple(example["name"] for example in examples),
        styles=tuple(example["style"] for example in examples),
    )

"""From images in [0, 1] to what an image tower takes, differentiably."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignprop_jax.errors import UserError

# Of the images CLIP was trained on (github.com/openai/CLIP), by channel.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# PIL's numbers, which preprocessor_config.json holds.
_BILINEAR, _BICUBIC = 2, 3


@dataclasses.dataclass(frozen=True)
class CLIPPreprocessor:
    """Resizes the shorter edge to `size`, crops the middle `size` by `size`, and normalises.

    Follows transformers' CLIPImageProcessor, but for its rounding to 8 bits: values that the
    bicubic filter puts outside of [0, 1] are kept, and with them the gradient of every pixel.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_folder(cls, folder: str | Path) -> "CLIPPreprocessor":
        """Reads `preprocessor_config.json`.

        Raises:
            UserError: the file is absent or cannot be read, or asks for what is not implemented.
        """
        path = Path(folder) / "preprocessor_config.json"
        config = _read_json(path)
        size, mean, std = _read_settings(path, config, resample=_BICUBIC)
        if _edge(config.get("crop_size", size)) != size:
            raise UserError(f"{path}: needs crop_size equal to size")
        return cls(size, mean, std)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b s s 3"]:
        """The pixel values of images in [0, 1]."""
        images = crop_middle(resize_shorter_edge(images, self.size), self.size)
        return _normalize(images, self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class OwlPreprocessor:
    """Makes an image the `size` by `size` pixels that a detector takes, and normalises.

    Follows transformers' OwlViTImageProcessor, which stretches with a bicubic filter, or with
    `pads` its Owlv2ImageProcessor, which completes a square with black at the bottom or right and
    interpolates linearly; of square images no larger than `size` both show every pixel. Like
    `CLIPPreprocessor` it rounds and clips nothing.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pads: bool

    @classmethod
    def from_folder(cls, folder: str | Path, pads: bool) -> "OwlPreprocessor":
        """Reads `preprocessor_config.json`.

        Raises:
            UserError: the file is absent or cannot be read, or asks for what is not implemented.
        """
        path = Path(folder) / "preprocessor_config.json"
        config = _read_json(path)
        settings = _read_settings(path, config, resample=_BILINEAR if pads else _BICUBIC)
        if config.get("do_center_crop"):
            raise UserError(f"{path}: has do_center_crop=true, supported: false")
        return cls(*settings, pads)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b s s 3"]:
        """The pixel values of images in [0, 1]."""
        batch, height, width, _ = images.shape
        if self.pads:
            longer = max(height, width)
            images = jnp.pad(images, ((0, 0), (0, longer - height), (0, longer - width), (0, 0)))
        if images.shape[1:3] != (self.size, self.size):
            shape = (batch, self.size, self.size, 3)
            method = "linear" if self.pads else "cubic"
            images = jax.image.resize(
                images, shape, method, antialias=True, precision=jax.lax.Precision.HIGHEST
            )
        return _normalize(images, self.mean, self.std)


def resize_shorter_edge(images: Float[Array, "b h w c"], size: int) -> Float[Array, "b H W c"]:
    """Bicubic with antialiasing (Keys, a = -0.5), as PIL and PyTorch's antialias=True do it."""
    batch, height, width, channels = images.shape
    shorter = min(height, width)
    if shorter == size:
        return images
    shape = (batch, size * height // shorter, size * width // shorter, channels)
    # Two small matrix products, one an axis: full precision costs nothing and keeps the parity.
    return jax.image.resize(
        images, shape, "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST
    )


def crop_middle(images: Float[Array, "b h w c"], size: int) -> Float[Array, "b s s c"]:
    """The middle `size` by `size` pixels; of an odd rest, the smaller half is cut at the start."""
    top, left = ((extent - size) // 2 for extent in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def _normalize(
    images: Float[Array, "b h w 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b h w 3"]:
    mean, std = (np.array(value, np.float32).reshape(1, 1, 1, 3) for value in (mean, std))
    return (images - mean) / std


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: cannot be understood ({error!r})") from error


def _read_settings(
    path: Path, config: dict[str, Any], resample: int
) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """The edge, the mean and the standard deviation of the images a tower takes."""
    try:
        size = _edge(config["size"])
        mean, std = (tuple(map(float, config[f"image_{key}"])) for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be understood ({error!r})") from error
    if len(mean) != 3 or len(std) != 3:
        raise UserError(f"{path}: needs a mean and a std for each of three channels")
    if config.get("resample", resample) != resample:
        raise UserError(f"{path}: has resample={config['resample']}, supported: {resample}")
    return size, mean, std


def _edge(size: int | dict[str, int]) -> int:
    """The one edge length of transformers' several ways to write a size."""
    if isinstance(size, int):
        return size
    edges = set(size.values())
    if len(edges) != 1:
        raise ValueError(f"size {size} is not square")
    return int(edges.pop())

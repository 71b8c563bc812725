"""From images in [0, 1] to what an image tower takes, differentiably."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignprop_jax.errors import UserError
from alignprop_jax.foreign_json import (
    Field,
    Schema,
    list_of,
    number,
    one_of,
    optional,
    read_json_fields,
    refused,
)

# Of the images CLIP was trained on (github.com/openai/CLIP), by channel.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# PIL's numbers, which preprocessor_config.json holds.
_BILINEAR, _BICUBIC = 2, 3
_MAX_EDGE = 4096


def _edge(size: Any) -> int:
    """The one edge length of transformers' several ways to write a size."""
    edges = set(size.values()) if isinstance(size, dict) else {size}
    (edge,) = edges
    if type(edge) is not int or not 1 <= edge <= _MAX_EDGE:
        raise ValueError
    return edge


_EDGE = Field(_edge, f"square: a whole number from 1 to {_MAX_EDGE}, or an object of such")
_SCHEMA: Schema = {
    "do_normalize": optional(one_of(True, default=True)),
    "do_rescale": optional(one_of(True, default=True)),
    "do_resize": optional(one_of(True, default=True)),
    "image_mean": list_of(number(-10, 10), 3, 3),
    "image_std": list_of(number(1e-3, 10), 3, 3),
    "rescale_factor": optional(one_of(1 / 255, default=1 / 255)),
    "size": _EDGE,
}


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
    def from_folder(cls, folder: str | Path, image_size: int) -> "CLIPPreprocessor":
        """Reads `preprocessor_config.json`.

        Args:
            image_size: what the image tower takes.

        Raises:
            UserError: the file is absent or cannot be read, or asks for what is not implemented.
        """
        schema = {"crop_size": optional(_EDGE)}
        return cls(*_read_settings(folder, image_size, _BICUBIC, schema))

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
    def from_folder(cls, folder: str | Path, image_size: int, pads: bool) -> "OwlPreprocessor":
        """Reads `preprocessor_config.json`; arguments and errors as for `CLIPPreprocessor`."""
        schema = {"do_center_crop": optional(one_of(False, default=False))}
        resample = _BILINEAR if pads else _BICUBIC
        return cls(*_read_settings(folder, image_size, resample, schema), pads)

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


def _read_settings(
    folder: str | Path, image_size: int, resample: int, schema: Schema
) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """The edge, the mean and the standard deviation of the images a tower takes.

    Args:
        image_size: what both sizes must be. A tower would see patches at the places of others, or
            have no place for them.
        resample: the number of the filter that is implemented.
        schema: of keys that not all preprocessors share.
    """
    path = Path(folder) / "preprocessor_config.json"
    resample = {"resample": optional(one_of(resample, default=resample))}
    values = read_json_fields(path, {**_SCHEMA, **resample, **schema})
    for key in ("size", "crop_size"):
        if values.get(key) not in (None, image_size):
            allowed = f"image_size={image_size}, which config.json has"
            raise UserError(f"{path}: {refused(key, values[key], allowed)}")
    return values["size"], values["image_mean"], values["image_std"]

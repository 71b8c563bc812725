"""From images in [0, 1] to what a CLIP image tower takes, differentiably."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from alignprop_jax.errors import UserError

# Of the images CLIP was trained on (github.com/openai/CLIP), by channel.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3  # PIL's number, which preprocessor_config.json holds


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
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            size, crop = (_edge(config[key]) for key in ("size", "crop_size"))
            mean, std = (tuple(map(float, config[f"image_{key}"])) for key in ("mean", "std"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: cannot be understood ({error!r})") from error
        if crop != size or len(mean) != 3 or len(std) != 3:
            raise UserError(f"{path}: needs crop_size equal to size, and a mean and std a channel")
        if config.get("resample", _BICUBIC) != _BICUBIC:
            raise UserError(f"{path}: has resample={config['resample']}, supported: {_BICUBIC}")
        return cls(size, mean, std)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b s s 3"]:
        """The pixel values of images in [0, 1]."""
        images = crop_middle(resize_shorter_edge(images, self.size), self.size)
        mean, std = (
            np.array(value, np.float32).reshape(1, 1, 1, 3) for value in (self.mean, self.std)
        )
        return (images - mean) / std


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


def _edge(size: int | dict[str, int]) -> int:
    """The one edge length of transformers' several ways to write a size."""
    if isinstance(size, int):
        return size
    edges = set(size.values())
    if len(edges) != 1:
        raise ValueError(f"size {size} is not square")
    return int(edges.pop())

"""The size of real JPEG files: what the compressibility rewards estimate, measured."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from alignprop_jax.rewards.base import Scorer
from alignprop_jax.rewards.pixels import to_uint8

_START_OF_SCAN = b"\xff\xda"
_SCAN_HEADER, _END_OF_IMAGE = 12, 2  # bytes, for three components


def jpeg_kilobytes(quality: int) -> Scorer:
    """A scorer of images [B, H, W, 3] in [0, 1]: the kB (1,000 bytes) that Pillow codes each in.

    The headers, of one size for every picture, do not count.
    """

    def score(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return np.array(
            [_coded_bytes(image, quality) / 1000 for image in np.asarray(images)], np.float32
        )

    return score


def _coded_bytes(image: np.ndarray, quality: int) -> int:
    file = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(file, "JPEG", quality=quality)
    scan = file.getvalue().partition(_START_OF_SCAN)[2]
    return len(scan) - _SCAN_HEADER - _END_OF_IMAGE

"""Pictures as the bytes of a file."""

import numpy as np


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Maps images [..., H, W, 3] in [0, 1] to bytes; what is outside, or NaN, is clipped."""
    return np.round(np.clip(np.nan_to_num(images), 0.0, 1.0) * 255.0).astype(np.uint8)

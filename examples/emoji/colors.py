"""Named colours, and the tinting of a picture with them."""

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (226, 44, 44),
    "orange": (250, 136, 24),
    "yellow": (250, 208, 36),
    "green": (52, 168, 62),
    "blue": (40, 108, 232),
    "purple": (138, 60, 196),
    "pink": (252, 124, 184),
    "brown": (134, 82, 44),
    "gray": (134, 138, 144),
    "black": (48, 48, 54),
}
"""Colour word -> sRGB of its middle tone."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_OPAQUE = 128


def tint(sprite: np.ndarray, color: str) -> np.ndarray:
    """Paints a picture in shades of one colour, keeping which parts are light and which dark.

    Lightness is stretched to the picture's own range first, so that a white sheep turns red as
    fully as a brown bear; its darkest parts (eyes, outlines) become a deep shade of the colour, its
    lightest a pale one.

    Args:
      sprite: uint8 [H, W, 4], RGBA.
      color: a key of `COLORS`.

    Returns:
      uint8 [H, W, 4] with the alpha of `sprite`.
    """
    luma = sprite[..., :3] @ _LUMA
    low, high = np.percentile(luma[sprite[..., 3] >= _OPAQUE], [2, 98])
    lightness = np.clip((luma - low) / max(high - low, 1.0), 0, 1)
    ramp = _shades(color)[(lightness * 255).astype(np.uint8)]
    return np.concatenate([ramp, sprite[..., 3:]], axis=-1)


def _shades(color: str) -> np.ndarray:
    """uint8 [256, 3] from a deep shade of the colour over the colour itself to a pale one."""
    middle = np.array(COLORS[color], np.float32)
    stops = np.stack([0.25 * middle, middle, middle + 0.45 * (255 - middle)])
    position = np.linspace(0, 1, 256)
    return np.stack(
        [np.interp(position, [0, 0.65, 1], channel) for channel in stops.T], axis=-1
    ).astype(np.uint8)

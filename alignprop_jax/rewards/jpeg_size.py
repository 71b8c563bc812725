"""A differentiable estimate of how many bytes a baseline JPEG of an image takes.

Follows ITU-T T.81 (1992) and JFIF with the choices of libjpeg and Pillow: chroma at half
resolution, the example tables of Annex K scaled by quality, Huffman codes of Annex K. What is
rounded there is smooth here, so the estimate has a gradient everywhere.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_BLOCK = 8
_MCU = 16  # pixels across a minimum coded unit: four blocks of luma, one of each chroma

# T.81, tables K.1 and K.2, in rows of eight.
_LUMA_QUANTIZATION = np.array(
    """
    16 11 10 16  24  40  51  61
    12 12 14 19  26  58  60  55
    14 13 16 24  40  57  69  56
    14 17 22 29  51  87  80  62
    18 22 37 56  68 109 103  77
    24 35 55 64  81 104 113  92
    49 64 78 87 103 121 120 101
    72 92 95 98 112 100 103  99
    """.split(),
    np.float64,
).reshape(_BLOCK, _BLOCK)
_CHROMA_QUANTIZATION = np.full((_BLOCK, _BLOCK), 99.0)
_CHROMA_QUANTIZATION[:4, :4] = [
    [17, 18, 24, 47],
    [18, 21, 26, 66],
    [24, 26, 56, 99],
    [47, 66, 99, 99],
]

# JFIF: from RGB in [0, 255] to Y, Cb and Cr; without the offset of 128 that the level shift undoes.
_RGB_TO_YCBCR = np.array(
    [
        [0.299, 0.587, 0.114],
        [-0.168736, -0.331264, 0.5],
        [0.5, -0.418688, -0.081312],
    ]
)

# Lengths of Annex K's Huffman codes, tables K.3 to K.6. A DC difference of s bits: by s, up to 11.
_LUMA_DC_LENGTHS = (2, 3, 3, 3, 3, 3, 4, 5, 6, 7, 8, 9)
_CHROMA_DC_LENGTHS = (2, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
# An AC coefficient of s bits after r zeros, at most 16: a + b s + log2(1 + r) (c + d s), the least
# squares fit to the table weighted by 2^-length; on that average it is off by 0.33 and 0.20 bits.
_LUMA_AC_LENGTH = (0.850, 0.779, 1.200, 0.914)
_CHROMA_AC_LENGTH = (1.229, 0.853, 0.727, 0.996)
_LONGEST_CODE = 16
_LUMA_END_OF_BLOCK, _CHROMA_END_OF_BLOCK = 4, 2


def quantization_table(quality: int, chroma: bool) -> np.ndarray:
    """The divisors [8, 8] of DCT coefficients at a quality in 1 to 100, scaled as libjpeg does."""
    base = _CHROMA_QUANTIZATION if chroma else _LUMA_QUANTIZATION
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((base * scale + 50) // 100, 1, 255)


def jpeg_bytes(images: Float[Array, "b h w 3"], quality: int) -> Float[Array, " b"]:
    """Estimates the bytes of the coded image data, without the headers, whose size is fixed.

    Args:
        images: in [0, 1].
        quality: 1 to 100, as Pillow's.
    """
    images = _extend_to_whole_units(images) * 255.0
    luma, *chroma = jnp.moveaxis(images @ _RGB_TO_YCBCR.T.astype(np.float32), -1, 0)
    bits = _component_bits(
        _blocks_by_unit(luma - 128.0),
        quantization_table(quality, chroma=False),
        _LUMA_DC_LENGTHS,
        _LUMA_AC_LENGTH,
        _LUMA_END_OF_BLOCK,
    )
    for component in chroma:
        batch, height, width = component.shape
        halved = component.reshape(batch, height // 2, 2, width // 2, 2).mean((2, 4))
        bits += _component_bits(
            _blocks(halved),
            quantization_table(quality, chroma=True),
            _CHROMA_DC_LENGTHS,
            _CHROMA_AC_LENGTH,
            _CHROMA_END_OF_BLOCK,
        )
    return bits / 8.0


def _extend_to_whole_units(images: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
    height, width = images.shape[1:3]
    padding = ((0, 0), (0, -height % _MCU), (0, -width % _MCU), (0, 0))
    return jnp.pad(images, padding, mode="edge")


def _blocks(plane: Float[Array, "b h w"]) -> Float[Array, "b n 8 8"]:
    batch, height, width = plane.shape
    blocks = plane.reshape(batch, height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
    return blocks.swapaxes(2, 3).reshape(batch, -1, _BLOCK, _BLOCK)


def _blocks_by_unit(plane: Float[Array, "b h w"]) -> Float[Array, "b n 8 8"]:
    """The blocks in the order they are coded in: by units of two by two."""
    batch, height, width = plane.shape
    units = plane.reshape(batch, height // _MCU, 2, _BLOCK, width // _MCU, 2, _BLOCK)
    return units.transpose(0, 1, 4, 2, 5, 3, 6).reshape(batch, -1, _BLOCK, _BLOCK)


def _component_bits(
    blocks: Float[Array, "b n 8 8"],
    quantization: np.ndarray,
    dc_lengths: tuple[int, ...],
    ac_length: tuple[float, float, float, float],
    end_of_block: int,
) -> Float[Array, " b"]:
    basis = _dct_basis()
    # Full precision: late coefficients are small differences of large sums.
    coefficients = jnp.einsum(
        "ui,bnij,vj,uv->bnuv",
        basis,
        blocks,
        basis,
        (1.0 / quantization).astype(np.float32),
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(*blocks.shape[:2], -1)
    dc, ac = coefficients[..., 0], coefficients[..., _zigzag()[1:]]

    differences = jnp.diff(dc, axis=1, prepend=0.0)
    dc_size = _magnitude_bits(differences)
    dc_bits = jnp.interp(dc_size, np.arange(12.0), np.array(dc_lengths, np.float32)) + dc_size

    nonzero = _nonzero_share(ac)
    run = _expected_run(nonzero)
    size = _magnitude_bits(ac)
    a, b, c, d = ac_length
    code = jnp.minimum(a + b * size + jnp.log2(1.0 + run) * (c + d * size), _LONGEST_CODE)
    ac_bits = (nonzero * (code + size)).sum(-1) + end_of_block * (1.0 - nonzero[..., -1])
    return (dc_bits + ac_bits).sum(-1)


def _magnitude_bits(values: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Bits that a rounded value takes: 0 for 0, then 1 + floor(log2 |x|), smoothed."""
    return 0.5 * jnp.log2(1.0 + 3.0 * values**2)


def _nonzero_share(values: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Near 0 for what rounds to zero, near 1 for the rest: x^4 / (x^4 + 2^-4)."""
    fourth = (2.0 * values) ** 4
    return fourth / (fourth + 1.0)


def _expected_run(nonzero: Float[Array, "b n k"]) -> Float[Array, "b n k"]:
    """Expected number of zeros right before each coefficient, if they were independent."""

    def step(run, share):
        return (1.0 - share) * (1.0 + run), run

    first = jnp.zeros(nonzero.shape[:-1], nonzero.dtype)
    _, runs = jax.lax.scan(step, first, jnp.moveaxis(nonzero, -1, 0))
    return jnp.moveaxis(runs, 0, -1)


def _dct_basis() -> np.ndarray:
    """Rows of the orthonormal DCT-II of 8 points (T.81, A.3.3)."""
    frequency, position = np.mgrid[:_BLOCK, :_BLOCK]
    basis = np.cos((2 * position + 1) * frequency * math.pi / (2 * _BLOCK)) / 2
    basis[0] /= math.sqrt(2)
    return basis.astype(np.float32)


def _zigzag() -> np.ndarray:
    """Flat indices of an 8 x 8 block in the order its coefficients are coded in (T.81, fig. 5)."""
    row, column = np.divmod(np.arange(_BLOCK**2), _BLOCK)
    diagonal = row + column
    return np.lexsort((np.where(diagonal % 2, row, column), diagonal))

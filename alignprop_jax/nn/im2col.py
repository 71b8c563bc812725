"""Convolutions as one product of matrices, for CPUs (im2col, col2im).

A row of the left one is what the kernel covers for one pixel of the result (Chellapilla, Puri and
Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006, section 2).
It takes the memory of as many images as the kernel has pixels.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Of fewer, the compiler's own convolution is as fast.
_FEWEST_CHANNELS = 256


def pays(result: tuple[int, ...], kernel: Float[Array, "k l i o"]) -> bool:
    """Whether there are many channels and few pixels in the result ([b, h, w, o]).

    It is the pixels that the compiler's own convolution divides between cores. The left matrix is
    smaller than the kernel then.
    """
    return min(kernel.shape[2:]) >= _FEWEST_CHANNELS and _has_few_pixels(result)


def convolve(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "k l i o"],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> Float[Array, "b H W o"]:
    """`jax.lax.conv_general_dilated` of images."""
    parts = covered(x, kernel.shape, strides, padding)
    batch, height, width, _ = parts[0].shape
    rows = jnp.concatenate(parts, -1).reshape(batch * height * width, -1)
    return (rows @ kernel.reshape(-1, kernel.shape[-1])).reshape(batch, height, width, -1)


def input_gradient(
    cotangent: Float[Array, "b H W o"],
    kernel: Float[Array, "k l i o"],
    shape: tuple[int, ...],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> Float[Array, "b h w i"]:
    """The gradient of `convolve` by its input, of this shape (col2im).

    No zeros are put between the pixels of a strided convolution's cotangent, nor is the kernel
    turned.
    """
    of_kernel = kernel.reshape(-1, *kernel.shape[2:])
    # The compiler reads its second matrix against the grain: that is to be the smaller one.
    if _has_few_pixels(cotangent.shape):
        products = jnp.einsum("pio,bhwo->pibhw", of_kernel, cotangent)
        parts = [product.transpose(1, 2, 3, 0) for product in products]
    else:
        products = jnp.einsum("bhwo,pio->bhwpi", cotangent, of_kernel)
        parts = [products[..., pixel, :] for pixel in range(len(of_kernel))]
    by_x = functools.partial(covered, kernel_shape=kernel.shape, strides=strides, padding=padding)
    return jax.linear_transpose(by_x, jax.ShapeDtypeStruct(shape, cotangent.dtype))(parts)[0]


def covered(
    x: Float[Array, "b h w i"],
    kernel_shape: tuple[int, ...],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> list[Float[Array, "b H W i"]]:
    """What each of the kernel's pixels, row by row, is multiplied with for each of the result's."""
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def lines(axis, offset):
        number = (padded.shape[1 + axis] - kernel_shape[axis]) // strides[axis] + 1
        return slice(offset, offset + (number - 1) * strides[axis] + 1, strides[axis])

    rows, columns = ([lines(axis, i) for i in range(kernel_shape[axis])] for axis in (0, 1))
    return [padded[:, row, column] for row in rows for column in columns]


def _has_few_pixels(shape):
    """Whether there are no more of them than channels."""
    return math.prod(shape[:-1]) <= shape[-1]

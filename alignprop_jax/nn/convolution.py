"""Convolution with its gradient written out, for XLA's CPU compiler does not find a fast one.

Large ones of 3 x 3 go by minimal filtering there, see `winograd`, and those of many channels and
few pixels as a product of matrices, see `im2col`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from alignprop_jax.nn import im2col, saved_names, winograd

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolve(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "k l i o"],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> Float[Array, "b H W o"]:
    """`jax.lax.conv_general_dilated` of images.

    In the body of a loop, XLA's CPU compiler takes 5 times as long for the gradient of `x` as for
    the convolution that it is, and 30 times as long for that of the kernel as for its products.
    """
    # The compilers for CPUs and TPUs are faster with the product that this one is.
    if kernel.shape[:2] == strides == (1, 1) and padding == ((0, 0), (0, 0)):
        out = x @ kernel[0, 0]
    else:
        out = _convolve(x, kernel, strides, padding)
    return checkpoint_name(out, saved_names.CONVOLUTION)


def convolve_upsampled(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], *settings: object
) -> Float[Array, "b 2*h 2*w o"]:
    """`convolve` of images whose height and width were doubled by repeating pixels; keeps the size.

    Of the three rows or columns that a kernel covers there, two are the same, whose weights are
    added up beforehand. That leaves a kernel of 2 x 2 for each pixel of four, at 4/9 of the work.

    Args:
        settings: those of `convolve` for one that keeps the size.
    """
    del settings
    weights = kernel.astype(jnp.float32)

    def halves(weights, axis, phase):
        first, middle, last = jnp.split(weights, 3, axis)
        parts = (first + middle, last) if phase else (first, middle + last)
        return jnp.concatenate(parts, axis)

    def of_phase(row, column):
        of_both = halves(halves(weights, 0, row), 1, column).astype(kernel.dtype)
        return convolve(x, of_both, (1, 1), ((1 - row, row), (1 - column, column)))

    batch, height, width, _ = x.shape
    rows = [jnp.stack([of_phase(row, column) for column in (0, 1)], 3) for row in (0, 1)]
    return jnp.stack(rows, 2).reshape(batch, 2 * height, 2 * width, -1)


def _plain(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_DIMENSIONS)


# Jitted, as its gradients are, so that layers of a shape are traced once.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _fastest(x, kernel, strides, padding):
    plain = functools.partial(_plain, strides=strides, padding=padding)
    if winograd.pays(x, kernel, strides, padding):
        on_cpu = winograd.convolve
    elif im2col.pays(jax.eval_shape(plain, x, kernel).shape, kernel):
        on_cpu = functools.partial(im2col.convolve, strides=strides, padding=padding)
    else:
        return plain(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x, kernel, strides, padding):
    return _fastest(x, kernel, strides, padding)


def _forward(x, kernel, strides, padding):
    out = _fastest(x.value, kernel.value, strides, padding)
    # A frozen kernel's gradient needs no activations: their shape without images stands for them.
    kept = x.value if kernel.perturbed else x.value[:0]
    return out, (kept, kernel.value)


def _backward(strides, padding, residuals, cotangent):
    x, kernel = residuals
    shape = (cotangent.shape[0], *x.shape[1:])
    x_gradient = _fastest_input_gradient(cotangent, kernel, shape, strides, padding)
    if x.shape != shape:
        return x_gradient, jnp.zeros_like(kernel)
    return x_gradient, _fastest_kernel_gradient(x, cotangent, kernel.shape, strides, padding)


_convolve.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _fastest_input_gradient(cotangent, kernel, shape, strides, padding):
    def on_cpu(cotangent, kernel):
        if winograd.pays(cotangent, kernel, strides, padding):
            return winograd.input_gradient(cotangent, kernel)
        if max(strides) > 1 or im2col.pays(cotangent.shape, kernel):
            return im2col.input_gradient(cotangent, kernel, shape, strides, padding)
        return _input_gradient(cotangent, kernel, shape, padding)

    def elsewhere(cotangent, kernel):
        by_x = functools.partial(_plain, kernel=kernel, strides=strides, padding=padding)
        x = jax.ShapeDtypeStruct(shape, cotangent.dtype)
        return jax.linear_transpose(by_x, x)(cotangent)[0]

    return jax.lax.platform_dependent(cotangent, kernel, cpu=on_cpu, default=elsewhere)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _fastest_kernel_gradient(x, cotangent, shape, strides, padding):
    def on_cpu(x, cotangent):
        return _kernel_gradient(x, cotangent, shape, strides, padding)

    def elsewhere(x, cotangent):
        def by_kernel(kernel):
            return _plain(x, kernel, strides, padding)

        kernel = jax.ShapeDtypeStruct(shape, cotangent.dtype)
        return jax.linear_transpose(by_kernel, kernel)(cotangent)[0]

    return jax.lax.platform_dependent(x, cotangent, cpu=on_cpu, default=elsewhere)


def _input_gradient(cotangent, kernel, shape, padding):
    """The convolution of the cotangent and the turned kernel, at stride 1."""
    turned = jax.lax.rev(kernel, (0, 1)).swapaxes(2, 3)
    pads = [
        (kernel.shape[axis] - 1 - low, shape[1 + axis] - cotangent.shape[1 + axis] + low)
        for axis, (low, _) in enumerate(padding)
    ]
    return _plain(cotangent, turned, (1, 1), pads)


def _kernel_gradient(x, cotangent, shape, strides, padding):
    """For each of the kernel's pixels, the product of the cotangent and what it was applied to."""
    products = [
        jnp.einsum("bhwi,bhwo->io", part, cotangent)
        for part in im2col.covered(x, shape, strides, padding)
    ]
    return jnp.stack(products).reshape(shape)

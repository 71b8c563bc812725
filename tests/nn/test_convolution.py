"""Convolution against PyTorch's: value and both gradients, as they are and in a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.nn import im2col, winograd
from alignprop_jax.nn.convolution import convolve, convolve_upsampled
from tests.torch_pipeline import torch


def torch_convolution(x, kernel, stride, padding, upsampled):
    """The value as NHWC and a function to both gradients, as NHWC and HWIO."""
    x = torch.tensor(np.moveaxis(x, -1, 1), requires_grad=True)
    kernel = torch.tensor(kernel.transpose(3, 2, 0, 1).copy(), requires_grad=True)
    (top, bottom), (left, right) = padding
    padded = torch.nn.functional.interpolate(x, scale_factor=2.0) if upsampled else x
    padded = torch.nn.functional.pad(padded, (left, right, top, bottom))
    y = torch.nn.functional.conv2d(padded, kernel, stride=stride)

    def gradients(cotangent):
        y.backward(torch.tensor(np.moveaxis(cotangent, -1, 1).copy()))
        return np.moveaxis(x.grad.numpy(), 1, -1), kernel.grad.numpy().transpose(2, 3, 1, 0)

    return np.moveaxis(y.detach().numpy(), 1, -1), gradients


@pytest.mark.parametrize(
    "size, stride, padding, upsampled",
    [
        ((3, 3), 1, ((1, 1), (1, 1)), False),
        ((1, 1), 1, ((0, 0), (0, 0)), False),
        ((3, 3), 2, ((1, 1), (1, 1)), False),
        ((3, 3), 2, ((0, 1), (0, 1)), False),
        ((3, 2), 1, ((2, 0), (1, 3)), False),
        ((3, 3), 1, ((1, 1), (1, 1)), True),
    ],
)
@pytest.mark.parametrize("in_loop", [False, True])
def test_value_and_gradients_are_pytorchs(size, stride, padding, upsampled, in_loop):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 8, 3)).astype(np.float32)
    kernel = rng.standard_normal((*size, 3, 5)).astype(np.float32)
    by = convolve_upsampled if upsampled else convolve

    def apply(x, kernel):
        if not in_loop:
            return by(x, kernel, (stride, stride), padding)
        twice = jax.lax.map(lambda half: by(half, kernel, (stride, stride), padding), x[:, None])
        return twice[:, 0]

    y, vjp = jax.jit(lambda x, kernel: jax.vjp(apply, x, kernel))(x, kernel)
    cotangent = rng.standard_normal(y.shape).astype(np.float32)
    wanted, gradients = torch_convolution(x, kernel, stride, padding, upsampled)
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    for got, expected in zip(jax.jit(vjp)(cotangent), gradients(cotangent), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("height, width, parts", [(4, 6, 1), (8, 6, 2), (4, 26, 2)])
def test_minimal_filtering_is_pytorchs(monkeypatch, height, width, parts):
    """All rows of tiles at once, some, and one, which is more than there should be."""
    monkeypatch.setattr(winograd, "_FEWEST_CHANNELS", 1)
    monkeypatch.setattr(winograd, "_FEWEST_TILES", 1)
    monkeypatch.setattr(winograd, "_MOST_TILES", 12)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, height, width, 4)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 4, 5)).astype(np.float32)

    def apply(x, kernel):
        return convolve(x, kernel, (1, 1), ((1, 1), (1, 1)))

    lowered = jax.jit(apply).lower(x, kernel).as_text()
    assert "stablehlo.convolution" not in lowered
    assert ("stablehlo.while" in lowered) == (parts > 1)
    y, vjp = jax.jit(lambda x, kernel: jax.vjp(apply, x, kernel))(x, kernel)
    cotangent = rng.standard_normal(y.shape).astype(np.float32)
    wanted, gradients = torch_convolution(x, kernel, 1, ((1, 1), (1, 1)), upsampled=False)
    np.testing.assert_allclose(y, wanted, atol=2e-5)
    for got, expected in zip(jax.jit(vjp)(cotangent), gradients(cotangent), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_loop_holds_no_more_than_one_transformed_kernel():
    """Of six, all of which XLA would transform before it."""
    kernels = [jax.ShapeDtypeStruct((3, 3, 256, 256), np.float32)] * 6
    x = jax.ShapeDtypeStruct((1, 32, 32, 256), np.float32)

    def step(x, kernels):
        for kernel in kernels:
            x = convolve(x, kernel, (1, 1), ((1, 1), (1, 1)))
        return x

    def apply(x, kernels):
        return jax.lax.fori_loop(0, 3, lambda _, x: step(x, kernels), x)

    compiled = jax.jit(apply).lower(x, kernels).compile()
    a_transformed_kernel = 16 * 256 * 256 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * a_transformed_kernel


@pytest.mark.parametrize(
    "shape, kernel, stride, padding, dtype",
    [
        ((1, 32, 31, 256), (3, 3, 256, 256), 1, 1, "float32"),
        ((1, 32, 32, 256), (3, 3, 256, 128), 1, 1, "float32"),
        ((1, 32, 32, 256), (1, 1, 256, 256), 1, 0, "float32"),
        ((1, 32, 32, 256), (3, 3, 256, 256), 2, 1, "float32"),
        ((1, 32, 32, 256), (3, 3, 256, 256), 1, 0, "float32"),
        ((1, 16, 16, 256), (3, 3, 256, 256), 1, 1, "float32"),
        ((1, 32, 32, 256), (3, 3, 256, 256), 1, 1, "bfloat16"),
    ],
)
def test_minimal_filtering_is_not_for_all(shape, kernel, stride, padding, dtype):
    """Odd sizes, few channels, other kernels, strides and padding, few pixels, half precision."""
    x, kernel = (jax.ShapeDtypeStruct(size, dtype) for size in (shape, kernel))
    assert not winograd.pays(x, kernel, (stride, stride), ((padding, padding),) * 2)
    large = jax.ShapeDtypeStruct((1, 32, 32, 256), "float32")
    square = jax.ShapeDtypeStruct((3, 3, 256, 256), "float32")
    assert winograd.pays(large, square, (1, 1), ((1, 1), (1, 1)))


@pytest.mark.parametrize(
    "size, stride, padding",
    [
        ((3, 3), 1, ((1, 1), (1, 1))),
        ((3, 3), 2, ((1, 1), (1, 1))),
        ((3, 3), 2, ((0, 1), (0, 1))),
        ((3, 2), 1, ((2, 0), (1, 3))),
        ((2, 3), 3, ((0, 0), (1, 0))),
    ],
)
def test_a_product_of_matrices_is_pytorchs(monkeypatch, size, stride, padding):
    monkeypatch.setattr(im2col, "_FEWEST_CHANNELS", 1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 7, 4)).astype(np.float32)
    kernel = rng.standard_normal((*size, 4, 140)).astype(np.float32)

    def apply(x, kernel):
        return convolve(x, kernel, (stride, stride), padding)

    def gradients(x, kernel, cotangent):
        return jax.vjp(apply, x, kernel)[1](cotangent)

    wanted, wanted_gradients = torch_convolution(x, kernel, stride, padding, upsampled=False)
    cotangent = rng.standard_normal(wanted.shape).astype(np.float32)
    for function, arguments in ((apply, (x, kernel)), (gradients, (x, kernel, cotangent))):
        assert "stablehlo.convolution" not in jax.jit(function).lower(*arguments).as_text()
    np.testing.assert_allclose(jax.jit(apply)(x, kernel), wanted, atol=2e-5)
    got = jax.jit(gradients)(x, kernel, cotangent)
    for gradient, expected in zip(got, wanted_gradients(cotangent), strict=True):
        np.testing.assert_allclose(gradient, expected, atol=1e-4)


@pytest.mark.parametrize(
    "result, kernel",
    [
        ((1, 16, 16, 255), (3, 3, 256, 255)),
        ((1, 16, 16, 256), (3, 3, 255, 256)),
        ((1, 16, 17, 256), (3, 3, 256, 256)),
        ((2, 16, 16, 256), (3, 3, 256, 256)),
    ],
)
def test_a_product_of_matrices_is_not_for_all(result, kernel):
    """Not for few channels, nor many pixels."""
    assert not im2col.pays(result, jax.ShapeDtypeStruct(kernel, "float32"))
    square = jax.ShapeDtypeStruct((3, 3, 256, 256), "float32")
    assert im2col.pays((1, 16, 16, 256), square)


def test_the_gradient_of_strides_convolves_no_zeros():
    """On CPUs, few channels as they are: what XLA's convolution would do between the pixels."""
    kernel = jnp.ones((3, 3, 3, 5))

    def gradient(x, cotangent):
        _, vjp = jax.vjp(lambda x: convolve(x, kernel, (2, 2), ((1, 1), (1, 1))), x)
        return vjp(cotangent)

    lowered = jax.jit(gradient).lower(jnp.ones((1, 8, 8, 3)), jnp.ones((1, 4, 4, 5)))
    assert " convolution(" not in lowered.compile().as_text()


@pytest.mark.parametrize("edge, channels", [(4, 3), (32, 256)])
def test_other_platforms_have_jaxs_own_gradients(edge, channels):
    """What a TPU's compiler is given is the transpose of a convolution, and no product."""
    x, kernel = jnp.ones((1, edge, edge, channels)), jnp.ones((3, 3, channels, channels))

    def gradient(x, kernel):
        return jax.grad(lambda *args: convolve(*args, (1, 1), ((1, 1), (1, 1))).sum(), (0, 1))(
            x, kernel
        )

    lowered = jax.jit(gradient).trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("stablehlo.convolution") == 3 - 1
    assert "stablehlo.dot_general" not in lowered


def test_a_frozen_kernel_keeps_no_activations():
    x, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 5))

    def of_x(x):
        return convolve(x, kernel, (1, 1), ((1, 1), (1, 1)))

    _, vjp = jax.vjp(of_x, x)
    assert all(leaf.size != x.size for leaf in jax.tree.leaves(vjp))

"""Layers that are written here and not taken from flax, against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.nn.layers import gelu, group_norm
from tests.torch_pipeline import torch


@pytest.mark.parametrize("shape", [(2, 5, 7, 12), (3, 9, 12)])
def test_group_norm_and_its_gradients_are_pytorchs(shape):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) * 3 + 2).astype(np.float32)
    params = {name: rng.standard_normal(12).astype(np.float32) for name in ("scale", "bias")}
    cotangent = rng.standard_normal(shape).astype(np.float32)
    module = group_norm(4, 1e-5, "norm", jnp.float32)
    y, vjp = jax.vjp(lambda params, x: module.apply({"params": params}, x), params, x)
    params_gradient, x_gradient = vjp(cotangent)

    tensor = torch.tensor(np.moveaxis(x, -1, 1), requires_grad=True)
    norm = torch.nn.GroupNorm(4, 12, eps=1e-5)
    norm.weight.data, norm.bias.data = map(torch.from_numpy, (params["scale"], params["bias"]))
    expected = norm(tensor)
    expected.backward(torch.from_numpy(np.moveaxis(cotangent, -1, 1).copy()))
    np.testing.assert_allclose(y, np.moveaxis(expected.detach().numpy(), 1, -1), atol=1e-5)
    np.testing.assert_allclose(x_gradient, np.moveaxis(tensor.grad.numpy(), 1, -1), atol=1e-5)
    np.testing.assert_allclose(params_gradient["scale"], norm.weight.grad, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(params_gradient["bias"], norm.bias.grad, rtol=1e-5, atol=1e-4)


def test_group_norm_of_bfloat16_has_statistics_in_float32():
    x = jnp.full((1, 64, 64, 8), 3.0, jnp.bfloat16).at[:, ::2].set(3.125)
    module = group_norm(2, 1e-5, "norm", jnp.bfloat16)
    y = module.apply({"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}, x)
    # Of two values half a standard deviation of 1 / 16 to either side of their mean.
    np.testing.assert_allclose(np.abs(np.float32(y)), 1.0, atol=0.01)


def test_gelu_is_pytorchs():
    x = np.linspace(-6, 6, 2001, dtype=np.float32)
    np.testing.assert_allclose(gelu(x), torch.nn.functional.gelu(torch.from_numpy(x)), atol=1e-6)


def test_gelu_of_bfloat16_is_off_by_no_more_than_rounding():
    x = jnp.linspace(-6, 6, 2001).astype(jnp.bfloat16)
    exact = torch.nn.functional.gelu(torch.from_numpy(np.float32(x))).numpy()
    error = np.abs(np.float32(gelu(x)) - exact)
    # Half a unit in the last of 8 places, and where the result is next to nothing the absolute
    # error of the approximation.
    assert (error <= np.abs(exact) * 2.0**-8 + 5e-4).all()

"""Attention by blocks of queries, against PyTorch's and for its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.models import layers
from tests.torch_pipeline import torch

HEADS = 2


def inputs(queries, keys):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, n, 8)).astype(np.float32) for n in (queries, keys, keys)]


def attend(query, key, value):
    return layers.dot_product_attention(query, key, value, HEADS)


@pytest.mark.parametrize("queries, keys", [(13, 13), (12, 5), (9, 13)])
def test_blocks_and_their_gradient_are_pytorchs(monkeypatch, queries, keys):
    """Numbers of queries that the blocks of 4 divide, and others."""
    monkeypatch.setattr(layers, "_MOST_QUERIES_AT_ONCE", 6)
    monkeypatch.setattr(layers, "_QUERIES_A_BLOCK", 4)
    arrays = inputs(queries, keys)
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    split = [x.reshape(2, -1, HEADS, 8 // HEADS).transpose(1, 2) for x in tensors]
    expected = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2)
    expected = expected.reshape(2, queries, 8)
    expected.square().sum().backward()

    assert "while" in jax.jit(attend).lower(*arrays).as_text()
    np.testing.assert_allclose(attend(*arrays), expected.detach().numpy(), atol=1e-6)
    gradients = jax.grad(lambda *x: (attend(*x) ** 2).sum(), argnums=(0, 1, 2))(*arrays)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=1e-5)


def test_the_weights_of_all_queries_are_never_there_at_once():
    """Those of 4,096 tokens by two heads would take 134 MB, and their gradient as much."""
    shape = jax.ShapeDtypeStruct((1, 4096, 16), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: (attend(x, x, x) ** 2).sum()))
    memory = gradient.lower(shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096**2 * HEADS * 4

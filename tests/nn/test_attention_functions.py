"""The ways to attend: against PyTorch's, value and gradient, and for their memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from alignprop_jax.nn import attention_functions, flash_attention, tiled_attention
from tests.torch_pipeline import torch

HEADS, WIDTH = 2, 4
VMEM = 64 * 2**20


def inputs(queries, keys):
    rng = np.random.default_rng(0)
    shapes = [(2, tokens, HEADS, WIDTH) for tokens in (queries, keys, keys)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def assert_equals_pytorch(attend, arrays):
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    split = [x.transpose(1, 2) for x in tensors]
    expected = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2)
    expected.square().sum().backward()

    def objective(*arrays):
        out = attend(*arrays)
        return (out**2).sum(), out

    program = jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))
    gradients, out = program(*arrays)
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-6)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=2e-6, atol=1e-5)


def test_plain_attention_is_pytorchs():
    assert_equals_pytorch(attention_functions.attend, inputs(13, 5))


@pytest.mark.parametrize("queries, keys", [(13, 13), (12, 5), (9, 13)])
def test_attention_in_blocks_is_pytorchs(monkeypatch, queries, keys):
    """Numbers of queries that the blocks of 4 divide, and others."""
    monkeypatch.setattr(attention_functions, "_MOST_QUERIES_AT_ONCE", 6)
    monkeypatch.setattr(attention_functions, "_QUERIES_A_BLOCK", 4)
    arrays = inputs(queries, keys)
    assert "while" in jax.jit(attention_functions.attend_in_blocks).lower(*arrays).as_text()
    assert_equals_pytorch(attention_functions.attend_in_blocks, arrays)


@pytest.mark.parametrize("queries, keys", [(12, 12), (12, 5), (7, 9)])
def test_attention_in_tiles_is_pytorchs(monkeypatch, queries, keys):
    """Several tiles, of equal numbers of queries, for each head of each image."""
    monkeypatch.setattr(tiled_attention, "_MOST_WEIGHTS_A_TILE", 4 * keys)
    monkeypatch.setattr(tiled_attention, "_FEWEST_KEYS", 5)
    monkeypatch.setattr(tiled_attention, "_FEWEST_QUERIES_A_TILE", 1)
    arrays = inputs(queries, keys)
    assert "while" in jax.jit(tiled_attention.attend_in_tiles).lower(*arrays).as_text()
    assert_equals_pytorch(tiled_attention.attend_in_tiles, arrays)


@pytest.mark.parametrize("queries, keys", [(4096, 77), (4 * 1031, 4096)])
def test_tiles_leave_to_the_blocks_what_is_small_or_odd(queries, keys):
    """A prompt's few keys, and a number of queries that has no useful divisor."""
    shapes = [jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32) for n in (queries, keys, keys)]

    def traced(attend):
        return str(jax.make_jaxpr(attend)(*shapes))

    in_tiles = traced(tiled_attention.attend_in_tiles)
    assert in_tiles == traced(attention_functions.attend_in_blocks)


@pytest.mark.parametrize(
    "queries, keys, vmem_bytes, rows",
    [(256, 384, VMEM, 256), (256, 7, VMEM, 256), (384, 384, 9 * 2**18, 128)],
)
def test_attention_by_the_kernel_is_pytorchs(monkeypatch, queries, keys, vmem_bytes, rows):
    """As a TPU would run it, on an interpreter; several blocks, keys that fill none, and parts."""
    monkeypatch.setattr(attention_functions, "_FEWEST_QUERIES_FOR_THE_KERNEL", 256)
    monkeypatch.setattr(flash_attention, "_BLOCKS", (128,))
    arrays = inputs(queries, keys)
    attend = functools.partial(attention_functions.attend_by_kernel, vmem_bytes=vmem_bytes)
    sizes = (queries, keys, HEADS, HEADS * WIDTH, 4)
    assert flash_attention.choose_tiles(*sizes, vmem_bytes).rows == rows
    with pltpu.force_tpu_interpret_mode():
        assert "pallas_call" in str(jax.make_jaxpr(attend)(*arrays))
        assert_equals_pytorch(attend, arrays)


@pytest.mark.parametrize(
    "channels, heads, megabytes, tiles",
    [
        (320, 8, 64, (4096, 512, 512)),
        (320, 8, 16, (2048, 256, 256)),
        (640, 10, 16, (1024, 256, 256)),
    ],
)
def test_the_kernel_takes_what_a_chip_has_room_for(channels, heads, megabytes, tiles):
    """4,096 tokens of Stable Diffusion 1.5 and XL; the compiler took these sizes on v5e and v4."""
    sizes = (4096, 4096, heads, channels, 2)
    assert flash_attention.choose_tiles(*sizes, megabytes * 2**20) == tiles


@pytest.mark.parametrize(
    "queries, keys, width", [(256, 256, 4), (1100, 1100, 4), (16384, 16384, 8192)]
)
def test_the_kernel_leaves_to_the_blocks_what_is_small_or_odd_or_too_large(queries, keys, width):
    shapes = [jax.ShapeDtypeStruct((1, n, 1, width), jnp.float32) for n in (queries, keys, keys)]
    attend = functools.partial(attention_functions.attend_by_kernel, vmem_bytes=VMEM)
    assert "pallas_call" not in str(jax.make_jaxpr(attend)(*shapes))


@pytest.mark.parametrize(
    "attend", [attention_functions.attend_in_blocks, tiled_attention.attend_in_tiles]
)
def test_the_weights_of_all_queries_are_never_there_at_once(attend):
    """Those of 4,096 tokens by two heads would take 134 MB, and their gradient as much."""
    shape = jax.ShapeDtypeStruct((1, 4096, HEADS, 8), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: (attend(x, x, x) ** 2).sum()))
    memory = gradient.lower(shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096**2 * HEADS * 4

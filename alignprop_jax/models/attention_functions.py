"""Attention by head, softmax(Q K^T / sqrt(d)) V (Vaswani et al., 2017, eq. 1), in three ways.

They differ in what they store and in speed. Each takes queries [b, q, h, d], keys and values
[b, k, h, d], and returns [b, q, h, d]; the softmax is in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Attend = Callable[[Array, Array, Array], Array]

# Attention weights of all queries at once are stored up to here; of more, block by block.
_MOST_QUERIES_AT_ONCE, _QUERIES_A_BLOCK = 2048, 512
# Below, the weights are small and XLA's own fusions are as good.
_FEWEST_QUERIES_FOR_THE_KERNEL = 1024


def attend(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Bool[Array, "q k"] | None = None,
) -> Float[Array, "b q h d"]:
    """As the formula says, the weights [b, h, q, k] stored for the backward pass.

    Args:
        mask: True where a query may look at a key; None for everywhere.
    """
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask[None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def attend_in_blocks(
    query: Float[Array, "b q h d"], key: Float[Array, "b k h d"], value: Float[Array, "b k h d"]
) -> Float[Array, "b q h d"]:
    """Many queries block by block, each block computed again in the backward pass.

    Memory grows with the number of tokens and not with its square (Rabe and Staats, arXiv
    2112.05682).
    """
    batch, number, heads, width = query.shape
    if number <= _MOST_QUERIES_AT_ONCE:
        return attend(query, key, value)
    num_blocks = -(-number // _QUERIES_A_BLOCK)
    size = -(-number // num_blocks)
    padding = num_blocks * size - number
    blocks = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    blocks = blocks.reshape(batch, num_blocks, size, heads, width).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(lambda block: attend(block, key, value)), blocks)
    out = out.swapaxes(0, 1).reshape(batch, num_blocks * size, heads, width)
    return out[:, :number]


def attend_by_kernel(
    query: Float[Array, "b q h d"], key: Float[Array, "b k h d"], value: Float[Array, "b k h d"]
) -> Float[Array, "b q h d"]:
    """By a kernel for TPUs, which stores no weights, see `flash_attention`.

    What a chip's own memory has no room for goes by blocks, as do few queries.
    """
    # Only TPUs need it, and its import takes long.
    from alignprop_jax.models import flash_attention as flash

    num_queries, heads, width = query.shape[1:]
    sizes = (num_queries, key.shape[1], heads * width, query.dtype.itemsize)
    few = num_queries < _FEWEST_QUERIES_FOR_THE_KERNEL
    if few or not flash.fits(*sizes, flash.VMEM_BYTES):
        return attend_in_blocks(query, key, value)

    def side_by_side(x):
        return x.reshape(*x.shape[:2], heads * width)

    out = flash.flash_attention(*map(side_by_side, (query, key, value)), heads)
    return out.reshape(query.shape)

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
# The kernel works on tiles of so many tokens, and on heads of a multiple of so many channels.
_TILES, _LANES = (512, 256, 128), 128
# Below, the weights are small and XLA's own fusions are as good.
_FEWEST_TOKENS_FOR_THE_KERNEL = 1024


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
    """JAX's flash attention for TPUs (Dao et al., arXiv 2205.14135), which stores no weights.

    What does not fill its tiles, such as attention to a prompt, goes by blocks.
    """
    tokens = query.shape[1], key.shape[1]
    tile = next((tile for tile in _TILES if not any(n % tile for n in tokens)), None)
    if tile is None or min(tokens) < _FEWEST_TOKENS_FOR_THE_KERNEL:
        return attend_in_blocks(query, key, value)
    # Only TPUs need it, and its import takes long.
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    width = query.shape[-1]

    def by_head(x):
        padding = -width % _LANES
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding))).swapaxes(1, 2)

    forward = dict.fromkeys(("block_q", "block_k_major", "block_k"), tile)
    of_keys = ("block_q_major_dkv", "block_k_major_dkv", "block_k_dkv", "block_q_dkv")
    of_queries = ("block_k_major_dq", "block_k_dq", "block_q_dq")
    backward = dict.fromkeys((*of_keys, *of_queries), tile)
    out = flash.flash_attention(
        by_head(query),
        by_head(key),
        by_head(value),
        sm_scale=width**-0.5,
        block_sizes=flash.BlockSizes(block_b=1, **forward, **backward),
    )
    return out.swapaxes(1, 2)[..., :width]

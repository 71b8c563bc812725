"""Attention by head, softmax(Q K^T / sqrt(d)) V (Vaswani et al., 2017, eq. 1), in three ways.

They differ in what they store and in speed. Each takes queries [b, q, h, d], keys and values
[b, k, h, d], and returns [b, q, h, d]; the softmax is in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from alignprop_jax.nn import saved_names

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
    """As the formula says; of the weights [b, h, q, k], those of all queries are there at once.

    The backward pass takes them from the logits again and from the logarithm of each row's sum, as
    flash attention does (Dao et al., arXiv 2205.14135): less is stored, and the softmax is
    differentiated in one pass over the weights, where its definition takes several.

    Args:
        mask: True where a query may look at a key; None for everywhere.
    """
    return _attend(query, key, value, mask)


@jax.custom_vjp
def _attend(query, key, value, mask):
    return _attend_forward(query, key, value, mask)[0]


def _attend_forward(query, key, value, mask):
    logits, scale = _logits(query, key, mask), query.shape[-1] ** -0.5
    largest = logits.max(-1, keepdims=True)
    weights = jnp.exp((logits - largest) * scale)
    total = weights.sum(-1, keepdims=True)
    out = product("bhqk,bkhd->bhqd", weights.astype(value.dtype), value) / total
    out = out.astype(value.dtype).swapaxes(1, 2)
    log_sum = largest * scale + jnp.log(total)
    out, log_sum = (checkpoint_name(x, saved_names.ATTENTION) for x in (out, log_sum))
    return out, (query, key, value, mask, out, log_sum)


def _attend_backward(residuals, cotangent):
    query, key, value, mask, out, log_sum = residuals
    scale = query.shape[-1] ** -0.5
    weights = jnp.exp(_logits(query, key, mask) * scale - log_sum)
    # What the softmax's normalisation takes from every logit's gradient.
    mean = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    mean = mean.swapaxes(1, 2)[..., None]
    dlogits = weights * (product("bqhd,bkhd->bhqk", cotangent, value) - mean)
    dlogits, weights = dlogits.astype(query.dtype), weights.astype(value.dtype)
    dquery = product("bhqk,bkhd->bqhd", dlogits, key) * scale
    dkey = product("bhqk,bqhd->bkhd", dlogits, query) * scale
    dvalue = product("bhqk,bqhd->bkhd", weights, cotangent)
    return *(x.astype(query.dtype) for x in (dquery, dkey, dvalue)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _logits(query, key, mask):
    """Before they are scaled, in float32."""
    logits = product("bqhd,bkhd->bhqk", query, key)
    if mask is None:
        return logits
    return jnp.where(mask[None, None], logits, jnp.finfo(jnp.float32).min)


def product(subscripts: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of two arrays, in float32."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def attend_in_blocks(
    query: Float[Array, "b q h d"], key: Float[Array, "b k h d"], value: Float[Array, "b k h d"]
) -> Float[Array, "b q h d"]:
    """Many queries block by block, with the weights of one block at a time.

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
    out = jax.lax.map(lambda block: attend(block, key, value), blocks)
    out = out.swapaxes(0, 1).reshape(batch, num_blocks * size, heads, width)
    return out[:, :number]


def attend_by_kernel(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    vmem_bytes: int,
) -> Float[Array, "b q h d"]:
    """By a kernel for TPUs, which stores no weights, see `flash_attention`.

    What the chip's own memory, of `vmem_bytes`, has no room for goes by blocks, as do few queries.
    """
    # Only TPUs need it, and its import takes long.
    from alignprop_jax.nn import flash_attention as flash

    num_queries, heads, width = query.shape[1:]
    sizes = (num_queries, key.shape[1], heads, heads * width, query.dtype.itemsize)
    tiles = flash.choose_tiles(*sizes, vmem_bytes)
    if num_queries < _FEWEST_QUERIES_FOR_THE_KERNEL or tiles is None:
        return attend_in_blocks(query, key, value)

    def side_by_side(x):
        return x.reshape(*x.shape[:2], heads * width)

    out = flash.flash_attention(*map(side_by_side, (query, key, value)), heads, tiles, vmem_bytes)
    return out.reshape(query.shape)

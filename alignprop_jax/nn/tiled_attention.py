"""Attention for CPUs, tile by tile: the weights of one head, some queries and all keys at a time.

The weights of a tile stay in a core's cache, where those of all heads, which `attend_in_blocks`
computes at once, go to memory and back for each pass of the softmax. They lie as [k, q], so that
its sums and maxima are taken over the leading axis, element by element along the last.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from alignprop_jax.nn import saved_names
from alignprop_jax.nn.attention_functions import attend_in_blocks, product

# 4 MB of them. With the gradient, a quarter of it takes 14% longer, half 8%, and twice as much the
# same.
_MOST_WEIGHTS_A_TILE = 2**20
# Of fewer, the weights of all heads are small.
_FEWEST_KEYS = 1024
# Numbers of queries without a larger divisor would go one by one in the end: they go by blocks.
_FEWEST_QUERIES_A_TILE = 64


def attend_in_tiles(
    query: Float[Array, "b q h d"], key: Float[Array, "b k h d"], value: Float[Array, "b k h d"]
) -> Float[Array, "b q h d"]:
    """Attention tile by tile where there are many keys, else by `attend_in_blocks`.

    The backward pass takes the weights from the logits again and from the logarithm of each query's
    sum (Dao et al., arXiv 2205.14135, algorithm 4).
    """
    size = _queries_a_tile(query.shape[1], key.shape[1])
    if key.shape[1] < _FEWEST_KEYS or size < _FEWEST_QUERIES_A_TILE:
        return attend_in_blocks(query, key, value)
    return _attend(size, query, key, value)


def _queries_a_tile(queries: int, keys: int) -> int:
    most = min(queries, max(1, _MOST_WEIGHTS_A_TILE // keys))
    return next(size for size in range(most, 0, -1) if queries % size == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(size, query, key, value):
    return _forward(size, query, key, value)[0]


def _forward(size, query, key, value):
    scale = query.shape[-1] ** -0.5

    def attend_head(head):
        queries, key, value = head

        def attend_tile(query):
            logits = product("kd,qd->kq", key, query)
            largest = logits.max(0, keepdims=True)
            weights = jnp.exp((logits - largest) * scale)
            total = weights.sum(0, keepdims=True)
            out = product("kd,kq->dq", value, weights.astype(value.dtype)) / total
            return out.T.astype(value.dtype), largest * scale + jnp.log(total)

        return jax.lax.map(attend_tile, queries)

    heads = (_tiles(query, size), _heads(key), _heads(value))
    out, log_sum = jax.lax.map(attend_head, heads)
    out = checkpoint_name(_as_tokens(out, query.shape), saved_names.ATTENTION)
    log_sum = checkpoint_name(log_sum, saved_names.ATTENTION)
    return out, (query, key, value, out, log_sum)


def _backward(size, residuals, cotangent):
    query, key, value, out, log_sum = residuals
    scale = query.shape[-1] ** -0.5
    # What the softmax's normalisation takes from every logit's gradient.
    mean = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    mean = mean.swapaxes(1, 2).reshape(log_sum.shape)

    def differentiate_head(head):
        *queries, key, value = head

        def differentiate_tile(sums, tile):
            query, cotangent, mean, log_sum = tile
            weights = jnp.exp(product("kd,qd->kq", key, query) * scale - log_sum)
            dlogits = weights * (product("kd,qd->kq", value, cotangent) - mean)
            dlogits, weights = dlogits.astype(query.dtype), weights.astype(value.dtype)
            dkey = product("kq,qd->kd", dlogits, query)
            dvalue = product("kq,qd->kd", weights, cotangent)
            dquery = product("kd,kq->dq", key, dlogits)
            return (sums[0] + dkey, sums[1] + dvalue), dquery

        zeros = jnp.zeros(key.shape, jnp.float32)
        return jax.lax.scan(differentiate_tile, (zeros, zeros), tuple(queries))

    tiles = (_tiles(query, size), _tiles(cotangent, size), mean, log_sum)
    heads = (*tiles, _heads(key), _heads(value))
    (dkey, dvalue), dquery = jax.lax.map(differentiate_head, heads)
    dquery = dquery.swapaxes(2, 3)  # of a tile [d, q]
    gradients = (dquery * scale, query), (dkey * scale, key), (dvalue, value)
    return tuple(_as_tokens(x, like.shape).astype(like.dtype) for x, like in gradients)


_attend.defvjp(_forward, _backward)


def _heads(x: Float[Array, "b n h d"]) -> Float[Array, "b*h n d"]:
    batch, number, heads, width = x.shape
    return x.swapaxes(1, 2).reshape(batch * heads, number, width)


def _tiles(x: Float[Array, "b n h d"], size: int) -> Float[Array, "b*h n/size size d"]:
    return _heads(x).reshape(-1, x.shape[1] // size, size, x.shape[-1])


def _as_tokens(x: Array, shape: tuple[int, ...]) -> Float[Array, "b n h d"]:
    """What `_heads` or `_tiles` took apart, of this shape."""
    batch, number, heads, width = shape
    return x.reshape(batch, heads, number, width).swapaxes(1, 2)

"""Flash attention for TPUs (Dao et al., arXiv 2205.14135) of heads that share the channels.

Queries, keys and values stay as the projections leave them, [b, l, h*d]. With an axis of heads,
d = 40 channels would be stored as 128, and be transposed there and back; of so narrow heads that
takes longer than their products. Heads are taken apart in the chip's own memory instead, and
logits, weights and their gradients are never anywhere else.

The backward pass computes weights once, for all three gradients: that of the queries is held for as
many of an image's as there is room for while blocks of keys pass by (five products, where one pass
for queries and another for keys and values need seven). Where that is not all of them, each part
leaves gradients of keys and values of its own, which are then added up.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from alignprop_jax.nn import saved_names

_BLOCKS, _LANES = (512, 256, 128), 128
_NO_LOGIT = float(jnp.finfo(jnp.float32).min)
# Contract the last axis of both; the first of both.
_LAST, _FIRST = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


class Tiles(NamedTuple):
    """What a kernel has in the chip's own memory at a time.

    Attributes:
        rows: queries whose gradient is held while all keys pass by.
        queries: of them, at a time.
        keys: at a time, with their values.
    """

    rows: int
    queries: int
    keys: int


def choose_tiles(
    num_queries: int,
    num_keys: int,
    num_heads: int,
    channels: int,
    itemsize: int,
    vmem_bytes: int,
) -> Tiles | None:
    """The largest that a chip's own memory has room for in the backward pass, the larger one.

    Args:
        channels: of all heads.
        itemsize: bytes of a number.
        vmem_bytes: of that memory.

    Returns:
        None where no blocks divide the tokens or fit.
    """
    for block in _BLOCKS:
        queries, keys = _block(num_queries, block), _block(num_keys, block)
        if not (queries and keys):
            continue
        for parts in range(1, num_queries // queries + 1):
            tiles = Tiles(num_queries // parts, queries, keys)
            whole = num_queries % parts == 0 and tiles.rows % queries == 0
            if whole and _vmem(tiles, num_heads, channels, itemsize) < vmem_bytes:
                return tiles
    return None


def _block(number: int, largest: int) -> int:
    """Tokens at a time: as many as divide their number; all where they are few; 0 for neither."""
    if number < _BLOCKS[-1]:
        return number
    return next((size for size in _BLOCKS if size <= largest and number % size == 0), 0)


def _vmem(tiles: Tiles, num_heads: int, channels: int, itemsize: int) -> int:
    """Bytes of the backward pass, a little more than the compiler takes."""
    lanes = -(-channels // _LANES) * _LANES
    # The gradient of the rows, as it is summed up and twice as it is written, since the next
    # rows' begins before these have left; the same of each block that comes or goes.
    rows = tiles.rows * lanes * (4 + 2 * itemsize)
    blocks = 2 * 4 * (tiles.queries + tiles.keys) * lanes * itemsize
    sums = 2 * num_heads * tiles.keys * _LANES * 4
    # Logits, weights and their gradients, of two heads at a time.
    return rows + blocks + sums + 32 * tiles.queries * tiles.keys


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def flash_attention(
    query: Float[Array, "b q c"],
    key: Float[Array, "b k c"],
    value: Float[Array, "b k c"],
    num_heads: int,
    tiles: Tiles,
    vmem_bytes: int,
) -> Float[Array, "b q c"]:
    """softmax(Q K^T / sqrt(d)) V of each head, of d = c / num_heads channels.

    Args:
        tiles: of `choose_tiles`.
        vmem_bytes: of the chip's own memory.
    """
    return _forward(query, key, value, num_heads, tiles, vmem_bytes)[0]


def _forward(query, key, value, num_heads, tiles, vmem_bytes):
    batch, num_queries, channels = query.shape
    _, query_block, key_block = tiles
    width = channels // num_heads
    of_queries = pl.BlockSpec((1, query_block, channels), lambda b, q, k: (b, q, 0))
    of_keys = pl.BlockSpec((1, key_block, channels), lambda b, q, k: (b, k, 0))
    of_rows = pl.BlockSpec((1, query_block, num_heads), lambda b, q, k: (b, q, 0))
    out, log_sum = pl.pallas_call(
        functools.partial(_attend_block, num_heads=num_heads),
        grid=(batch, num_queries // query_block, key.shape[1] // key_block),
        in_specs=[of_queries, of_keys, of_keys],
        out_specs=[of_queries, of_rows],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, num_queries, num_heads), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((num_heads, query_block, width), jnp.float32),
            pltpu.VMEM((num_heads, query_block, 1), jnp.float32),
            pltpu.VMEM((num_heads, query_block, 1), jnp.float32),
        ],
        compiler_params=_compiler_params(vmem_bytes, "parallel", "parallel", "arbitrary"),
        name="attention",
    )(query, key, value)
    out, log_sum = (checkpoint_name(x, saved_names.ATTENTION) for x in (out, log_sum))
    return out, (query, key, value, out, log_sum)


def _backward(num_heads, tiles, vmem_bytes, residuals, cotangent):
    query, key, value, out, log_sum = residuals
    batch, num_queries, channels = query.shape
    rows, query_block, key_block = tiles
    parts, width = num_queries // rows, channels // num_heads

    def part(x):
        return x.reshape(batch * parts, rows, x.shape[-1])

    of_queries = pl.BlockSpec((1, query_block, channels), lambda p, k, q: (p, q, 0))
    of_keys = pl.BlockSpec((1, key_block, channels), lambda p, k, q: (jax.lax.div(p, parts), k, 0))
    of_sums = pl.BlockSpec((1, query_block, num_heads), lambda p, k, q: (p, q, 0))
    of_rows = pl.BlockSpec((1, rows, channels), lambda p, k, q: (p, 0, 0))
    to_keys = pl.BlockSpec((1, key_block, channels), lambda p, k, q: (p, k, 0))
    dq, dk, dv = pl.pallas_call(
        functools.partial(_differentiate_block, num_heads=num_heads, query_block=query_block),
        grid=(batch * parts, key.shape[1] // key_block, rows // query_block),
        in_specs=[of_queries, of_keys, of_keys, of_queries, of_queries, of_sums],
        out_specs=[of_rows, to_keys, to_keys],
        out_shape=[
            jax.ShapeDtypeStruct((batch * parts, rows, channels), query.dtype),
            *[jax.ShapeDtypeStruct((batch * parts, *x.shape[1:]), x.dtype) for x in (key, value)],
        ],
        scratch_shapes=[
            pltpu.VMEM((rows, channels), jnp.float32),
            pltpu.VMEM((num_heads, key_block, width), jnp.float32),
            pltpu.VMEM((num_heads, key_block, width), jnp.float32),
        ],
        compiler_params=_compiler_params(vmem_bytes, "parallel", "arbitrary", "arbitrary"),
        name="attention_gradient",
    )(part(query), key, value, part(out), part(cotangent), part(log_sum))

    def add_up(gradient, x):
        of_parts = gradient.reshape(batch, parts, *x.shape[1:])
        return of_parts.astype(jnp.float32).sum(1).astype(x.dtype)

    return dq.reshape(query.shape), add_up(dk, key), add_up(dv, value)


flash_attention.defvjp(_forward, _backward)


def _compiler_params(vmem_bytes: int, *semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem_bytes)


def _heads(num_heads: int, channels: int) -> Iterator[tuple[int, slice]]:
    width = channels // num_heads
    return ((head, slice(head * width, (head + 1) * width)) for head in range(num_heads))


def _product(a, b, dimensions=(((1,), (0,)), ((), ()))):
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _attend_block(q_ref, k_ref, v_ref, out_ref, log_sum_ref, acc_ref, max_ref, sum_ref, num_heads):
    """One block of keys for one of queries, by a running softmax (arXiv 1805.02867)."""
    channels = q_ref.shape[-1]
    scale = (channels // num_heads) ** -0.5

    @pl.when(pl.program_id(2) == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        max_ref[...] = jnp.full_like(max_ref, _NO_LOGIT)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for head, lanes in _heads(num_heads, channels):
        logits = _product(q_ref[0, :, lanes], k_ref[0, :, lanes], _LAST) * scale
        earlier = max_ref[head]
        largest = jnp.maximum(earlier, logits.max(axis=1, keepdims=True))
        weights = jnp.exp(logits - largest)
        shrink = jnp.exp(earlier - largest)
        max_ref[head] = largest
        sum_ref[head] = shrink * sum_ref[head] + weights.sum(axis=1, keepdims=True)
        value = v_ref[0, :, lanes]
        acc_ref[head] = shrink * acc_ref[head] + _product(weights.astype(value.dtype), value)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        for head, lanes in _heads(num_heads, channels):
            out_ref[0, :, lanes] = (acc_ref[head] / sum_ref[head]).astype(out_ref.dtype)
            log_sum_ref[0, :, head : head + 1] = max_ref[head] + jnp.log(sum_ref[head])


def _differentiate_block(
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    cotangent_ref,
    log_sum_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dq_acc_ref,
    dk_acc_ref,
    dv_acc_ref,
    num_heads,
    query_block,
):
    channels = q_ref.shape[-1]
    scale = (channels // num_heads) ** -0.5
    key_index, query_index = pl.program_id(1), pl.program_id(2)
    rows = pl.ds(query_index * query_block, query_block)

    @pl.when(key_index == 0)
    def _():
        dq_acc_ref[rows] = jnp.zeros((query_block, channels), jnp.float32)

    @pl.when(query_index == 0)
    def _():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    for head, lanes in _heads(num_heads, channels):
        query, key, value = q_ref[0, :, lanes], k_ref[0, :, lanes], v_ref[0, :, lanes]
        cotangent = cotangent_ref[0, :, lanes]
        weights = jnp.exp(_product(query, key, _LAST) * scale - log_sum_ref[0, :, head : head + 1])
        dv_acc_ref[head] += _product(weights.astype(cotangent.dtype), cotangent, _FIRST)
        # What the softmax's normalisation takes from every logit's gradient.
        mean = (cotangent.astype(jnp.float32) * out_ref[0, :, lanes].astype(jnp.float32)).sum(
            axis=1, keepdims=True
        )
        dlogits = weights * (_product(cotangent, value, _LAST) - mean) * scale
        dlogits = dlogits.astype(query.dtype)
        dk_acc_ref[head] += _product(dlogits, query, _FIRST)
        dq_acc_ref[rows, lanes] += _product(dlogits, key)

    @pl.when(query_index == pl.num_programs(2) - 1)
    def _():
        for head, lanes in _heads(num_heads, channels):
            dk_ref[0, :, lanes] = dk_acc_ref[head].astype(dk_ref.dtype)
            dv_ref[0, :, lanes] = dv_acc_ref[head].astype(dv_ref.dtype)

    @pl.when(key_index == pl.num_programs(1) - 1)
    def _():
        dq_ref[0, rows] = dq_acc_ref[rows].astype(dq_ref.dtype)

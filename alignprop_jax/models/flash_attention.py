"""Flash attention for TPUs (Dao et al., arXiv 2205.14135) of heads that share the channels.

Queries, keys and values stay as the projections leave them, [b, l, h*d]. With an axis of heads,
d = 40 channels would be stored as 128, and be transposed there and back; of so narrow heads that
takes longer than their products. Heads are taken apart in the chip's own memory instead, and
logits, weights and their gradients are never anywhere else.

The backward pass computes weights once, for all three gradients: that of the queries is held for a
whole image while blocks of keys pass by (five products, where one pass for queries and another for
keys and values need seven).
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from alignprop_jax.models.execution import SAVED_NAME

# What a kernel may take of the chip's own memory, on generations that have that much.
VMEM_BYTES = 64 * 2**20
# Of sums and weights of heads, by the compiler's word at most.
_OF_HEADS = 12 * 2**20
_BLOCKS, _LANES = (512, 256, 128), 128
_NO_LOGIT = float(jnp.finfo(jnp.float32).min)
# Contract the last axis of both; the first of both.
_LAST, _FIRST = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def flash_attention(
    query: Float[Array, "b q c"],
    key: Float[Array, "b k c"],
    value: Float[Array, "b k c"],
    num_heads: int,
) -> Float[Array, "b q c"]:
    """softmax(Q K^T / sqrt(d)) V of each head, of d = c / num_heads channels; see `fits`."""
    return _forward(query, key, value, num_heads)[0]


def fits(num_queries: int, num_keys: int, channels: int, itemsize: int, vmem_bytes: int) -> bool:
    """Whether a chip's own memory has room for the backward pass, the larger one.

    Args:
        itemsize: bytes of a number.
        vmem_bytes: of that memory.
    """
    if not (_block(num_queries) and _block(num_keys)):
        return False
    lanes = -(-channels // _LANES) * _LANES
    # The gradient of all queries, as it is summed up and twice as it is written, since the next
    # image's begins before this one's has left; the same of each block that comes or goes.
    image = num_queries * lanes * (4 + 2 * itemsize)
    blocks = 2 * (4 * _block(num_queries) + 4 * _block(num_keys)) * lanes * itemsize
    return image + blocks + _OF_HEADS < vmem_bytes


def _block(number: int) -> int:
    """Tokens at a time: as many as divide their number; all where they are few; 0 for neither."""
    if number < _BLOCKS[-1]:
        return number
    return next((size for size in _BLOCKS if number % size == 0), 0)


def _forward(query, key, value, num_heads):
    batch, num_queries, channels = query.shape
    query_block, key_block = _block(num_queries), _block(key.shape[1])
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
        compiler_params=_compiler_params("parallel", "parallel", "arbitrary"),
        name="attention",
    )(query, key, value)
    # Small, and so much work, that a block which is evaluated again had better have kept them.
    out, log_sum = (checkpoint_name(x, SAVED_NAME) for x in (out, log_sum))
    return out, (query, key, value, out, log_sum)


def _backward(num_heads, residuals, cotangent):
    query, key, value, out, log_sum = residuals
    batch, num_queries, channels = query.shape
    query_block, key_block = _block(num_queries), _block(key.shape[1])
    width = channels // num_heads
    of_queries = pl.BlockSpec((1, query_block, channels), lambda b, k, q: (b, q, 0))
    of_keys = pl.BlockSpec((1, key_block, channels), lambda b, k, q: (b, k, 0))
    of_rows = pl.BlockSpec((1, query_block, num_heads), lambda b, k, q: (b, q, 0))
    of_image = pl.BlockSpec((1, num_queries, channels), lambda b, k, q: (b, 0, 0))
    return pl.pallas_call(
        functools.partial(_differentiate_block, num_heads=num_heads, query_block=query_block),
        grid=(batch, key.shape[1] // key_block, num_queries // query_block),
        in_specs=[of_queries, of_keys, of_keys, of_queries, of_queries, of_rows],
        out_specs=[of_image, of_keys, of_keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)],
        scratch_shapes=[
            pltpu.VMEM((num_queries, channels), jnp.float32),
            pltpu.VMEM((num_heads, key_block, width), jnp.float32),
            pltpu.VMEM((num_heads, key_block, width), jnp.float32),
        ],
        compiler_params=_compiler_params("parallel", "arbitrary", "arbitrary"),
        name="attention_gradient",
    )(query, key, value, out, cotangent, log_sum)


flash_attention.defvjp(_forward, _backward)


def _compiler_params(*semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)


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

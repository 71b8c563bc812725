"""The layers all models share: linear with an optional LoRA term, convolution, norms, attention."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for linear and convolution.
KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Attention weights of all queries at once are stored up to here; of more, block by block.
_MOST_QUERIES_AT_ONCE, _QUERIES_A_BLOCK = 2048, 512


class Linear(nn.Module):
    """y = x W + b, plus (x down) up where the collection "lora" has factors for this layer.

    The scale alpha / rank of the low-rank term is the caller's: it comes folded into `up`.
    """

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        kernel = self.param("kernel", KERNEL_INIT, (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y += bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if self.has_variable("lora", "down"):
            down = self.get_variable("lora", "down").astype(self.dtype)
            up = self.get_variable("lora", "up").astype(self.dtype)
            y += (x @ down) @ up
        return y


def conv(
    features: int,
    kernel_size: int,
    name: str | None,
    dtype: jnp.dtype,
    stride: int = 1,
    padding: int | tuple[tuple[int, int], ...] | None = None,
    use_bias: bool = True,
) -> nn.Conv:
    """A square convolution that keeps the size at stride 1 unless `padding` says otherwise."""
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=stride,
        padding=kernel_size // 2 if padding is None else padding,
        use_bias=use_bias,
        kernel_init=KERNEL_INIT,
        dtype=dtype,
        name=name,
    )


def group_norm(num_groups: int, epsilon: float, name: str, dtype: jnp.dtype) -> nn.GroupNorm:
    """GroupNorm with statistics in float32 whatever the compute dtype."""
    return nn.GroupNorm(num_groups, epsilon=epsilon, dtype=dtype, name=name)


def layer_norm(epsilon: float, name: str | None, dtype: jnp.dtype) -> nn.LayerNorm:
    """LayerNorm with statistics in float32 whatever the compute dtype."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, name=name)


def dot_product_attention(
    query: Float[Array, "b q c"],
    key: Float[Array, "b k c"],
    value: Float[Array, "b k c"],
    num_heads: int,
    mask: Bool[Array, "q k"] | None = None,
) -> Float[Array, "b q c"]:
    """softmax(Q K^T / sqrt(d)) V by head, the softmax in float32 (Vaswani et al., 2017, eq. 1).

    Many queries are attended to in blocks, each computed again in the backward pass, so that memory
    grows with the number of tokens and not with its square (Rabe and Staats, arXiv 2112.05682).

    Args:
        mask: True where a query may look at a key; None for everywhere.
    """

    def split(x):
        return x.reshape(*x.shape[:2], num_heads, x.shape[-1] // num_heads)

    query, key, value = split(query), split(key), split(value)
    if mask is None and query.shape[1] > _MOST_QUERIES_AT_ONCE:
        out = _attend_in_blocks(query, key, value)
    else:
        out = _attend(query, key, value, mask)
    return out.reshape(*out.shape[:2], -1)


def _attend(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Bool[Array, "q k"] | None = None,
) -> Float[Array, "b q h d"]:
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
    logits *= query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask[None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def _attend_in_blocks(
    query: Float[Array, "b q h d"], key: Float[Array, "b k h d"], value: Float[Array, "b k h d"]
) -> Float[Array, "b q h d"]:
    batch, number, heads, width = query.shape
    num_blocks = -(-number // _QUERIES_A_BLOCK)
    size = -(-number // num_blocks)
    padding = num_blocks * size - number
    blocks = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    blocks = blocks.reshape(batch, num_blocks, size, heads, width).swapaxes(0, 1)
    attend = jax.checkpoint(lambda block: _attend(block, key, value))
    out = jax.lax.map(attend, blocks).swapaxes(0, 1)
    return out.reshape(batch, num_blocks * size, heads, width)[:, :number]


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the approximation OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": exact_gelu,
    "silu": jax.nn.silu,
}

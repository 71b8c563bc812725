"""The layers all models share: linear with an optional LoRA term, convolution, norms, attention."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from alignprop_jax.nn.attention_functions import Attend
from alignprop_jax.nn.convolution import convolve

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for linear and convolution.
KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def weight(
    module: nn.Module, name: str, initializer: Callable[..., Array], shape: tuple[int, ...]
) -> Array:
    """`module.param(name, initializer, shape)`, without a look at what is there already.

    For every use of a parameter, flax traces its initialisation to compare shapes. That is a sixth
    of the time that tracing a train step takes, and files are compared with the model as they are
    loaded.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, initializer, shape)


class Linear(nn.Module):
    """y = x W + b, plus (x down) up where the collection "lora" has factors for this layer.

    The scale alpha / rank of the low-rank term is the caller's: it comes folded into `up`.
    """

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        kernel = weight(self, "kernel", KERNEL_INIT, (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = weight(self, "bias", nn.initializers.zeros, (self.features,))
            y += bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if self.has_variable("lora", "down"):
            down = self.get_variable("lora", "down").astype(self.dtype)
            up = self.get_variable("lora", "up").astype(self.dtype)
            y += (x @ down) @ up
        return y


class Conv(nn.Module):
    """A square convolution that keeps the size at stride 1 unless `padding` says otherwise.

    Where the collection "lora" has factors for this layer, a convolution of as many pixels by
    "down" and one of 1 x 1 by "up" are added, see `Linear`.

    Attributes:
        by: a function of `convolution`.
    """

    features: int
    kernel_size: int
    dtype: jnp.dtype = jnp.float32
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None
    by: Callable[..., Array] = convolve

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b H W o"]:
        size, around = self.kernel_size, self.kernel_size // 2
        kernel = weight(self, "kernel", KERNEL_INIT, (size, size, x.shape[-1], self.features))
        bias = weight(self, "bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (y.astype(self.dtype) for y in (x, kernel, bias))
        padding = self.padding or ((around, around), (around, around))
        strides = (self.stride, self.stride)
        y = self.by(x, kernel, strides, padding) + bias.reshape((1, 1, 1, -1))
        if self.has_variable("lora", "down"):
            down = self.get_variable("lora", "down").astype(self.dtype)
            up = self.get_variable("lora", "up").astype(self.dtype)
            y += self.by(x, down, strides, padding) @ up[0, 0]
        return y


def repeat_rows(x: Shaped[Array, "b *s"], number: int) -> Shaped[Array, "n *s"]:
    """Every row so many times in a row that there are `number`, a multiple of what there are."""
    batch, *shape = x.shape
    if batch == number:
        return x
    repeated = jnp.broadcast_to(x[:, None], (batch, number // batch, *shape))
    return repeated.reshape(number, *shape)


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He, arXiv 1803.08494), statistics in float32 whatever the dtype.

    Sums run over pixels first and over a group's channels then, so that the feature map is never
    reshaped: groups of few channels would be laid out anew, forward and backward.
    """

    num_groups: int
    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *s c"]) -> Float[Array, "b *s c"]:
        batch, channels = x.shape[0], x.shape[-1]
        scale = weight(self, "scale", nn.initializers.ones, (channels,))
        bias = weight(self, "bias", nn.initializers.zeros, (channels,))
        x = x.astype(jnp.float32)
        pixels = tuple(range(1, x.ndim - 1))

        def of_group(mean: Float[Array, "b c"]) -> Float[Array, "b c"]:
            groups = mean.reshape(batch, self.num_groups, -1)
            mean = groups.mean(-1, keepdims=True)
            return jnp.broadcast_to(mean, groups.shape).reshape(batch, channels)

        mean = of_group(x.mean(pixels))
        variance = jnp.maximum(of_group((x * x).mean(pixels)) - mean**2, 0.0)
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale.astype(jnp.float32)[None]
        shift = bias.astype(jnp.float32)[None] - mean * factor
        factor, shift = (jnp.expand_dims(y, pixels) for y in (factor, shift))
        return (x * factor + shift).astype(self.dtype)


def group_norm(num_groups: int, epsilon: float, name: str, dtype: jnp.dtype) -> GroupNorm:
    """GroupNorm with statistics in float32 whatever the compute dtype."""
    return GroupNorm(num_groups, epsilon, dtype, name=name)


def layer_norm(epsilon: float, name: str | None, dtype: jnp.dtype) -> nn.LayerNorm:
    """LayerNorm with statistics in float32 whatever the compute dtype."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, name=name)


def dot_product_attention(
    query: Float[Array, "b q c"],
    key: Float[Array, "b k c"],
    value: Float[Array, "b k c"],
    num_heads: int,
    attend: Attend,
) -> Float[Array, "b q c"]:
    """Attention by `attend` (see `attention_functions`) of heads that share the channels."""

    def split(x):
        return x.reshape(*x.shape[:2], num_heads, x.shape[-1] // num_heads)

    out = attend(split(query), split(key), split(value))
    return out.reshape(*out.shape[:2], -1)


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the approximation OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """GELU (Hendrycks and Gimpel, arXiv 1606.08415): exact, but for bfloat16 with a tanh.

    The approximation is off by less than bfloat16 rounds, and much cheaper than the error function
    on a TPU.
    """
    if x.dtype == jnp.bfloat16:
        return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)
    # By erf, as PyTorch has it: JAX's own, by erfc, is exact far below zero, and takes longer.
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "silu": jax.nn.silu,
}

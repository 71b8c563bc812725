"""The UNet's transformer: self-attention, cross-attention to the prompt and a gated MLP."""

import operator

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignprop_jax.nn.execution import Execution, NetworkModule
from alignprop_jax.nn.layers import (
    Conv,
    Linear,
    dot_product_attention,
    gelu,
    group_norm,
    layer_norm,
    repeat_rows,
)
from alignprop_jax.nn.stacked_layers import EVERY, run_layers


class Attention(NetworkModule):
    """Multi-head attention of x over `context`, or over itself where there is none."""

    channels: int
    num_heads: int
    use_bias: bool = False
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b q c"], context: Float[Array, "b k d"] | None = None
    ) -> Float[Array, "b q c"]:
        context = x if context is None else context
        query = Linear(self.channels, self.use_bias, self.dtype, name="to_q")(x)
        key = Linear(self.channels, self.use_bias, self.dtype, name="to_k")(context)
        value = Linear(self.channels, self.use_bias, self.dtype, name="to_v")(context)
        out = dot_product_attention(query, key, value, self.num_heads, self.execution.attend)
        return Linear(self.channels, dtype=self.dtype, name="to_out.0")(out)


class GEGLU(NetworkModule):
    """One half of a projection gated by the GELU of the other (Shazeer, 2020)."""

    features: int
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l f"]:
        projected = Linear(2 * self.features, dtype=self.dtype, name="proj")(x)
        value, gate = jnp.split(projected, 2, axis=-1)
        return value * gelu(gate)


class FeedForward(NetworkModule):
    """The gated MLP, four times as wide inside."""

    channels: int
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l c"]:
        hidden = GEGLU(4 * self.channels, self.execution, name="net.0")(x)
        return Linear(self.channels, dtype=self.dtype, name="net.2")(hidden)


class TransformerBlock(NetworkModule):
    """Pre-norm self-attention, cross-attention and MLP, each with a residual.

    Where there are more prompts than images, each image meets several, one after the other.
    """

    channels: int
    num_heads: int
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l c"], context: Float[Array, "n k d"]
    ) -> Float[Array, "n l c"]:
        def norm(name):
            return layer_norm(1e-5, name, self.dtype)

        def attention(name):
            return Attention(self.channels, self.num_heads, execution=self.execution, name=name)

        x = repeat_rows(x + attention("attn1")(norm("norm1")(x)), context.shape[0])
        x = x + attention("attn2")(norm("norm2")(x), context)
        return x + FeedForward(self.channels, self.execution, name="ff")(norm("norm3")(x))


class Transformer2D(NetworkModule):
    """A stack of transformer blocks over the pixels of a feature map, with a residual around it."""

    num_heads: int
    num_layers: int
    num_groups: int
    use_linear_projection: bool
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "n k d"]
    ) -> Float[Array, "n h w c"]:
        batch, height, width, channels = x.shape

        def project(name, y):
            if self.use_linear_projection:
                return Linear(channels, dtype=self.dtype, name=name)(y)
            return Conv(channels, 1, self.dtype, name=name)(y)

        y = project("proj_in", group_norm(self.num_groups, 1e-6, "norm", self.dtype)(x))
        y = y.reshape(batch, height * width, channels)

        def layer(which):
            name = f"transformer_blocks{which}"
            return self.block(TransformerBlock)(channels, self.num_heads, self.execution, name=name)

        if self.num_layers == 1:
            y = layer(".0")(y, context)
        else:
            y = repeat_rows(y, context.shape[0])
            y = run_layers(operator.call, layer(EVERY), self.num_layers, y, context)
        y = project("proj_out", y.reshape(-1, height, width, channels))
        return repeat_rows(x, y.shape[0]) + y

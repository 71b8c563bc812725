"""The parts of a latent diffusion model, what its UNet is told, and its images."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignprop_jax.diffusion.schedulers import DDIMScheduler
from alignprop_jax.errors import UserError

Params = dict[str, Any]

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""The text encoders' names among the weights, in the order in which the UNet sees them."""


@dataclasses.dataclass(frozen=True)
class StableDiffusion:
    """The parts of a latent diffusion model, without their weights; hashable.

    The weights that go with it are a dict of parameter trees: "unet", "vae", "text_encoder" and,
    for a Stable Diffusion XL, "text_encoder_2".

    Attributes:
        text_encoders: one, or the two of Stable Diffusion XL.
        image_size: height and width of its images in pixels; (0, 0) for those the UNet was trained
            on.
        zero_empty_prompts: the UNet sees zeros in place of an empty prompt.

    Raises:
        UserError: the image size does not go through all levels of the UNet.
    """

    unet: nn.Module
    vae: nn.Module
    text_encoders: tuple[nn.Module, ...]
    scheduler: DDIMScheduler
    image_size: tuple[int, int] = (0, 0)
    zero_empty_prompts: bool = False

    def __post_init__(self):
        unit = self.vae.config.downscale * 2 ** (len(self.unet.config.channels) - 1)
        for name, size in zip(("height", "width"), self.image_size, strict=True):
            if size % unit:
                raise UserError(
                    f"sampler.{name} is {size}; images of this model need a multiple of {unit}"
                )

    def rematerialized(self) -> "StableDiffusion":
        """The model whose UNet and autoencoder evaluate their blocks again, see `Execution`."""
        unet, vae = (
            module.clone(execution=dataclasses.replace(module.execution, remat=True))
            for module in (self.unet, self.vae)
        )
        return dataclasses.replace(self, unet=unet, vae=vae)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the latents."""
        config = self.unet.config
        height, width = (
            size // self.vae.config.downscale or config.sample_size for size in self.image_size
        )
        return (height, width, config.in_channels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        height, width, _ = self.latent_shape
        downscale = self.vae.config.downscale
        return (height * downscale, width * downscale, 3)


@flax.struct.dataclass
class Conditioning:
    """What the UNet is told of prompts.

    Attributes:
        hidden_states: the text encoder's last ones, normalised; of Stable Diffusion XL's two, the
            penultimate ones side by side.
        pooled: the second text encoder's, projected.
    """

    hidden_states: Float[Array, "b l d"]
    pooled: Float[Array, "b p"] | None = None

    def __getitem__(self, rows) -> "Conditioning":
        """That of some of the prompts."""
        return jax.tree.map(lambda x: x[rows], self)


def encode_prompts(
    sd: StableDiffusion, params: Params, input_ids: Sequence[Int[Array, "b l"]]
) -> Conditioning:
    """Runs the text encoders.

    Args:
        input_ids: token ids for each text encoder.
    """
    states = [
        encoder.apply({"params": params[name]}, ids)
        for encoder, name, ids in zip(sd.text_encoders, TEXT_ENCODERS, input_ids, strict=False)
    ]
    if len(states) == 1:
        return Conditioning(states[0].last)
    hidden_states = jnp.concatenate([state.penultimate for state in states], axis=-1)
    return Conditioning(hidden_states, states[-1].pooled)


def apply_unet(
    sd: StableDiffusion,
    variables: Params,
    x_t: Float[Array, "b h w c"],
    timestep: Int[Array, "*b"],
    conditioning: Conditioning,
) -> Float[Array, "n h w c"]:
    """The UNet's output in float32; for several prompts an image, see `UNet`.

    A Stable Diffusion XL is told that its images were neither enlarged nor cropped.
    """
    time_ids = None
    if conditioning.pooled is not None:
        downscale = sd.vae.config.downscale
        height, width = (size * downscale for size in x_t.shape[1:3])
        sizes = jnp.array([height, width, 0, 0, height, width], jnp.float32)
        time_ids = jnp.broadcast_to(sizes, (conditioning.pooled.shape[0], sizes.size))
    return _traced_once(
        sd.unet, variables, x_t, timestep, conditioning.hidden_states, conditioning.pooled, time_ids
    )


@functools.partial(jax.jit, static_argnums=0)
def _traced_once(unet: nn.Module, variables: Params, *inputs: Any) -> Float[Array, "n h w c"]:
    """A program of its own to JAX, which is why it is traced once for all that evaluates it."""
    return unet.apply(variables, *inputs).astype(jnp.float32)


def decode_latents(
    sd: StableDiffusion, params: Params, latents: Float[Array, "b h w c"]
) -> Float[Array, "b H W 3"]:
    """Decodes latents to images in [0, 1], float32.

    Values outside of [0, 1] are clipped, for rewards as for people: the reward is of the very image
    that a user gets, and its gradient is exact. A saturated pixel thus has no gradient of its own;
    letting it through, or not clipping, would pay for colours that no screen shows.
    """
    scaled = latents / sd.vae.config.scaling_factor
    # Weights that are split over devices are gathered here, and not before a loop of microbatches.
    vae_params, scaled = jax.lax.optimization_barrier((params["vae"], scaled))
    decoded = sd.vae.apply({"params": vae_params}, scaled, method="decode")
    return jnp.clip(decoded.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)


def broadcast_to_batch(conditioning: Conditioning, batch: int) -> Conditioning:
    """One conditioning for each image, from one an image or one for all."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), conditioning)

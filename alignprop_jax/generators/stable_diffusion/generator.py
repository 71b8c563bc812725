"""Stable Diffusion as a generator: what its UNet is told, its steps, its pictures."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from alignprop_jax.core.generator import Adapter
from alignprop_jax.core.guidance import Guidance, classifier_free
from alignprop_jax.errors import UserError
from alignprop_jax.lora.factors import LoraTree, adapt
from alignprop_jax.nn.attention_functions import attend_in_blocks
from alignprop_jax.processes.ddim import DDIMScheduler, SamplerSteps

Params = dict[str, Any]
Latents = Float[Array, "b h w c"]

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""The text encoders' names among the weights, in the order in which the UNet sees them."""


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


@dataclasses.dataclass(frozen=True)
class StableDiffusion:
    """The parts of a latent diffusion model, without their weights: a `core.generator.Generator`.

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

    def on_one_device(self) -> "StableDiffusion":
        """The model whose UNet attends in blocks: other ways are divided among devices."""
        execution = dataclasses.replace(self.unet.execution, attend=attend_in_blocks)
        return dataclasses.replace(self, unet=self.unet.clone(execution=execution))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the latents."""
        config = self.unet.config
        height, width = (
            size // self.vae.config.downscale or config.sample_size for size in self.image_size
        )
        return (height, width, config.in_channels)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Height and width in pixels of a picture, and 3."""
        height, width, _ = self.latent_shape
        downscale = self.vae.config.downscale
        return (height * downscale, width * downscale, 3)

    @property
    def num_timesteps(self) -> int:
        """Those that the model was trained on."""
        return self.scheduler.num_train_timesteps

    def network(self, params: Params) -> Any:
        """The UNet's parameters."""
        return params["unet"]

    def start(self, key: Key[Array, ""]) -> Float[Array, "h w c"]:
        """Standard normal latents."""
        return jax.random.normal(key, self.latent_shape)

    def schedule(self, num_steps: int, eta: float = 0.0) -> SamplerSteps:
        """The constants of DDIM's steps."""
        return self.scheduler.plan(num_steps, eta)

    def is_random(self, eta: float) -> bool:
        """DDIM draws noise where eta is above 0."""
        return eta > 0

    def guidance(self, scale: float, shared: bool = True) -> Guidance:
        """Classifier-free guidance."""
        return classifier_free(scale, shared)

    def predict(
        self,
        weights: Any,
        adapter: Adapter | None,
        state: Latents,
        at: SamplerSteps,
        prompts: Conditioning,
    ) -> Float[Array, "n h w c"]:
        """The UNet's output in float32; for several prompts a picture, see `UNet`.

        A Stable Diffusion XL is told that its pictures were neither enlarged nor cropped.
        """
        variables = {"params": weights} if adapter is None else adapter.variables(weights)
        time_ids = None
        if prompts.pooled is not None:
            downscale = self.vae.config.downscale
            height, width = (size * downscale for size in state.shape[1:3])
            sizes = jnp.array([height, width, 0, 0, height, width], jnp.float32)
            time_ids = jnp.broadcast_to(sizes, (prompts.pooled.shape[0], sizes.size))
        return _traced_once(
            self.unet,
            variables,
            state,
            at.timesteps,
            prompts.hidden_states,
            prompts.pooled,
            time_ids,
        )

    def advance(
        self,
        prediction: Latents,
        state: Latents,
        at: SamplerSteps,
        keys: Key[Array, " b"] | None,
    ) -> Latents:
        """One step of DDIM."""
        noise = None if keys is None else _draw_noise(keys, state)
        return self.scheduler.step(prediction, state, at, noise)

    def renoise(self, state: Latents, at: SamplerSteps, keys: Key[Array, " b"]) -> Latents:
        """Clean latents among noise, as before the step."""
        return self.scheduler.add_noise(state, _draw_noise(keys, state), at.alpha_bar)

    def log_prob(
        self, prediction: Latents, state: Latents, next_state: Latents, at: SamplerSteps
    ) -> Float[Array, " b"]:
        """See `DDIMScheduler.log_prob`; `at` is one step or a row for each."""
        rows = 0 if jnp.ndim(at.timesteps) else None
        return jax.vmap(self.scheduler.log_prob, (0, 0, 0, rows))(prediction, state, next_state, at)

    def denoising_loss(
        self, predict: Callable[[Latents, SamplerSteps], Latents], state: Latents, keys: Any
    ) -> Float[Array, " b"]:
        """The squared error of the prediction at a random timestep, its mean over the latents."""

        def draw(key: Key[Array, ""]):
            time_key, noise_key = jax.random.split(key)
            timestep = jax.random.randint(time_key, (), 0, len(self.scheduler.alpha_bar))
            return timestep, jax.random.normal(noise_key, state.shape[1:])

        timesteps, noise = jax.vmap(draw)(keys)
        at = self.scheduler.at(timesteps)
        noisy = jax.vmap(self.scheduler.add_noise)(state, noise, at.alpha_bar)
        target = jax.vmap(self.scheduler.training_target)(state, noise, at.alpha_bar)
        return jnp.mean((predict(noisy, at) - target) ** 2, axis=(1, 2, 3))

    def finish(self, params: Params, state: Latents) -> Float[Array, "b H W 3"]:
        """Decodes latents to pictures in [0, 1], float32.

        Values outside of [0, 1] are clipped, for rewards as for people: the reward is of the very
        picture that a user gets, and its gradient is exact. A saturated pixel thus has no gradient
        of its own; letting it through, or not clipping, would pay for colours that no screen shows.
        """
        scaled = state / self.vae.config.scaling_factor
        # Weights that are split over devices are gathered here, and not before a loop of
        # microbatches.
        vae_params, scaled = jax.lax.optimization_barrier((params["vae"], scaled))
        decoded = self.vae.apply({"params": vae_params}, scaled, method="decode")
        return jnp.clip(decoded.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)

    def weights_that_tell(self, params: Params) -> list[Array]:
        """The kernels of the UNet's first and last convolution: any training changes them."""
        return [params["unet"][layer]["kernel"] for layer in ("conv_in", "conv_out")]


def encode_prompts(
    sd: StableDiffusion,
    params: Params,
    input_ids: Sequence[Int[Array, "b l"]],
    lora: LoraTree | None = None,
) -> Conditioning:
    """Runs the text encoders.

    Args:
        input_ids: token ids for each text encoder.
        lora: by part of the model, factors with their scale folded in.
    """
    lora = lora or {}
    states = [
        encoder.apply(adapt(params[name], lora.get(name)), ids)
        for encoder, name, ids in zip(sd.text_encoders, TEXT_ENCODERS, input_ids, strict=False)
    ]
    if len(states) == 1:
        return Conditioning(states[0].last)
    hidden_states = jnp.concatenate([state.penultimate for state in states], axis=-1)
    return Conditioning(hidden_states, states[-1].pooled)


@functools.partial(jax.jit, static_argnums=0)
def _traced_once(unet: nn.Module, variables: Params, *inputs: Any) -> Float[Array, "n h w c"]:
    """A program of its own to JAX, which is why it is traced once for all that evaluates it."""
    return unet.apply(variables, *inputs).astype(jnp.float32)


def _draw_noise(keys: Key[Array, " b"], like: Latents) -> Latents:
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:]))(keys)

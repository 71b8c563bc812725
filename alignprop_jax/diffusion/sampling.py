"""From noise and a prompt to images, differentiably: guidance and the scan over denoising steps."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from alignprop_jax.diffusion.stable_diffusion import (
    Conditioning,
    Params,
    StableDiffusion,
    apply_unet,
    broadcast_to_batch,
    decode_latents,
)
from alignprop_jax.errors import UserError
from alignprop_jax.lora.factors import adapt, scale_lora
from alignprop_jax.models import saved_names

REMAT_POLICIES = ("none", "partial", "step", "block")
_KEEPS_ARGUMENTS_ALONE = ("step", "block")
# A loop of their own takes its time to compile; that of fewer steps does not pay.
_LEAST_APART = 0.25
_COSTLY = jax.checkpoint_policies.save_only_these_names(*saved_names.ALL)


def steps_apart(never_trained: int, num_steps: int) -> int:
    """How many of the steps that no draw trains have a loop of their own, which keeps nothing."""
    return never_trained if never_trained >= _LEAST_APART * num_steps else 0


def gate_gradient(denoise: Callable[..., Array], remat: str) -> Callable[..., Array]:
    """Makes the passes of one denoiser call optional, decided at run time.

    The forward pass is `denoise` whatever the gate. The backward pass is a branch: with an open
    gate it differentiates `denoise`, with a closed gate it returns zeros and evaluates nothing, so
    that in a scan over steps the cost falls with every closed gate, one compiled program serves
    every choice of them, and the gradient of a closed call is zero exactly.

    Args:
        denoise: `denoise(lora, x_t, constants) -> model_output`.
        remat: what is kept for the backward pass: "none" keeps every activation; "partial" what
            convolutions and attention gave, from which the rest is computed again; "step" and
            "block" the arguments alone, with which all of `denoise` is evaluated again.

    Returns:
        `gated(gate, lora, x_t, constants, runs=None)`, differentiable in `lora` and `x_t`. The
        constants have no gradient, and therefore cost none. With `runs` the forward pass is a
        branch too, which evaluates nothing and gives zeros where it is False; the gate must be
        closed there. What may not be evaluated cannot be kept, so that only arguments are then.
    """

    @jax.custom_vjp
    def gated(gate, lora, x_t, constants, runs=None):
        del gate
        if runs is None:
            return denoise(lora, x_t, constants)
        # The branch is in here, where no gradient is taken of it: that of a cond copies the weights
        # at every step, to keep them for its backward pass.
        return jax.lax.cond(
            runs, denoise, lambda lora, x_t, constants: jnp.zeros_like(x_t), lora, x_t, constants
        )

    def forward(gate, lora, x_t, constants, runs):
        if remat in _KEEPS_ARGUMENTS_ALONE or runs is not None:
            output = gated(gate, lora, x_t, constants, runs)
            return output, (gate, lora, x_t, constants, None)

        def evaluate(lora, x_t):
            return denoise(lora, x_t, constants)

        if remat == "partial":
            evaluate = jax.checkpoint(evaluate, policy=_COSTLY, prevent_cse=False)
        output, vjp = jax.vjp(evaluate, lora, x_t)
        return output, (gate, lora, x_t, None, vjp)

    def backward(residuals, cotangent):
        gate, lora, x_t, constants, vjp = residuals

        def differentiate():
            if vjp is not None:
                return vjp(cotangent)
            return jax.vjp(lambda lora, x_t: denoise(lora, x_t, constants), lora, x_t)[1](cotangent)

        zeros = jax.tree.map(jnp.zeros_like, (lora, x_t))
        lora_cotangent, x_cotangent = jax.lax.cond(gate, differentiate, lambda: zeros)
        return None, lora_cotangent, x_cotangent, None, None

    gated.defvjp(forward, backward)
    return gated


def interleave(*batches: Shaped[Array, "b *s"]) -> Shaped[Array, "n*b *s"]:
    """Merges n batches, image by image, so that a batch split over devices stays where it is."""
    return jnp.stack(batches, axis=1).reshape(-1, *batches[0].shape[1:])


def make_denoiser(
    sd: StableDiffusion,
    guidance_scale: float,
    remat: str = "none",
    detach_input: bool = False,
    share: bool = True,
) -> Callable[..., Float[Array, "b h w c"]]:
    """Builds the UNet with classifier-free guidance.

    Args:
        guidance_scale: weight w of eps = u + w (c - u), Ho & Salimans, arXiv 2207.12598; 1 is
            without guidance, at half the cost.
        remat: with "step" and "block" the backward pass evaluates it again.
        detach_input: its input is a constant to the gradient.
        share: what guidance's two halves have in common is evaluated once, see `UNet`. XLA rounds
            that differently from one batch to another, which importance weights would see.

    Returns:
        `denoise(lora, x_t, constants)`, where the constants are the UNet's parameters, the
        conditioning of `pair_with_negative`, and the timestep, one for all images or one for each.
    """

    def denoise(lora, x_t, constants):
        unet_params, conditioning, timestep = constants
        if remat in _KEEPS_ARGUMENTS_ALONE:
            # Weights that are split over devices are to be gathered here, layer by layer. XLA would
            # do so once for all steps, and keep them whole.
            unet_params, x_t = jax.lax.optimization_barrier((unet_params, x_t))
        if detach_input:
            x_t = jax.lax.stop_gradient(x_t)
        variables = adapt(unet_params, lora)
        if guidance_scale == 1.0:
            return apply_unet(sd, variables, x_t, timestep, conditioning)
        if not share:
            x_t = interleave(x_t, x_t)
            timestep = timestep if jnp.ndim(timestep) == 0 else interleave(timestep, timestep)
        output = apply_unet(sd, variables, x_t, timestep, conditioning)
        unconditional, conditional = output[0::2], output[1::2]
        return unconditional + guidance_scale * (conditional - unconditional)

    return denoise


def pair_with_negative(
    conditioning: Conditioning, uncond: Conditioning, guidance_scale: float
) -> Conditioning:
    """What the denoiser of that guidance takes: each prompt's, after that of its negative prompt.

    Args:
        uncond: of the negative prompts, one an image or one for all.
    """
    if guidance_scale == 1.0:
        return conditioning
    batch = conditioning.hidden_states.shape[0]
    return jax.tree.map(interleave, broadcast_to_batch(uncond, batch), conditioning)


class Trajectory(NamedTuple):
    """A sample and the way to it."""

    images: Float[Array, "b H W 3"]
    latents: Float[Array, "b t+1 h w c"]  # from the noise to the last one, which is decoded
    log_probs: Float[Array, "b t"]  # of each step, see `DDIMScheduler.log_prob`


def make_sampler(
    sd: StableDiffusion,
    num_steps: int,
    guidance_scale: float,
    eta: float = 0.0,
    remat: str = "step",
    detach_input: bool = False,
    share: bool = True,
) -> Callable[..., Float[Array, "n*b H W 3"]]:
    """Builds the differentiable sampler of AlignProp (arXiv 2310.03739) and its relatives.

    Args:
        sd: the model.
        num_steps: number of denoising steps T.
        guidance_scale: weight w of classifier-free guidance, eps = u + w (c - u), Ho & Salimans,
            arXiv 2207.12598; 1 samples without guidance, at half the cost.
        eta: 0 for deterministic DDIM, 1 for DDPM's noise.
        remat: what of each step is stored for the backward pass, see `gate_gradient`. What "block"
            does besides is up to the modules, see `Execution`.
        detach_input: the UNet's input is a constant to the gradient, see `GradientPath`.
        share: see `make_denoiser`.

    Returns:
        `sample(params, lora, latents, conditioning, uncond, key, trained=None, stop=None,
        renoise=0, lora_timesteps=None) -> images`, a pure function, see there.

    Raises:
        UserError: for a setting that the model's scheduler cannot follow.
    """
    if remat not in REMAT_POLICIES:
        raise UserError(f"remat is {remat!r}; supported: {', '.join(REMAT_POLICIES)}")
    steps = sd.scheduler.plan(num_steps, eta)
    denoise = make_denoiser(sd, guidance_scale, remat, detach_input, share)
    gated_denoise = gate_gradient(denoise, remat)

    def sample(
        params: Params,
        lora: PyTree | None,
        latents: Float[Array, "b h w c"],
        conditioning: Conditioning,
        uncond: Conditioning,
        key: Key[Array, "*b"],
        trained: Bool[Array, " t"] | None = None,
        stop: Int[Array, ""] | None = None,
        renoise: int = 0,
        lora_timesteps: tuple[Int[Array, ""], Int[Array, ""]] | None = None,
        keep_latents: bool = False,
        never_trained: int = 0,
    ) -> Float[Array, "n*b H W 3"] | Trajectory:
        """Samples one image for each of the latents.

        Args:
            params: the frozen weights, "unet" and "vae".
            lora: the UNet's low-rank factors, or changes of its weights, with their scale folded
                in; None for the base model.
            latents: standard normal noise.
            conditioning: the encoded prompts.
            uncond: the encoded negative prompts, one an image or one for all; not used without
                guidance.
            key: source of the noise that eta > 0 and `renoise` add: one key, or one an image, which
                makes an image independent of the batch it is sampled in.
            trained: the steps at which the gradient enters the UNet; None for none. Elsewhere the
                UNet's output is a constant, while the latents keep their gradient, so that it
                crosses an untrained step along the linear terms of DDIM.
            stop: the step that is the last: its image is the x_0 it predicts. Those after it cost
                nothing and must not be trained. None for all steps, and the sample.
            renoise: copies of each sample that are noised to the last timestep and take the last
                step again, trained; the sample that they come from is a constant to them.
            lora_timesteps: the highest and the lowest timestep at which the UNet has the LoRA, both
                included; None for all.
            keep_latents: gives the latents on the way, too; without `renoise` and `stop`.
            never_trained: so many of the first steps are False in every `trained`, so that nothing
                need be kept of them; without `stop` and `keep_latents`.

        `trained`, `stop` and `lora_timesteps` are data: one compiled program serves all of them.

        Returns:
            Images in [0, 1], each followed by its copies; a `Trajectory` with `keep_latents`.
        """
        batch = latents.shape[0]
        conditioning = pair_with_negative(conditioning, uncond, guidance_scale)
        if trained is None:
            trained = jnp.zeros(num_steps, bool)
        keys = jax.random.split(key, batch) if key.ndim == 0 else key
        # A copy is one more step of the scan, after which the sample itself is carried on.
        num_rows = num_steps + renoise
        trained = jnp.append(trained, jnp.ones(renoise, bool)) if renoise else trained
        rows = steps.repeating_the_last(renoise) if renoise else steps
        rows = rows if stop is None else rows.ending_at(stop)

        # Noise of a number below num_rows is eta's, of one above it the copies'.
        def draw_noise(index):
            return jax.vmap(
                lambda key: jax.random.normal(jax.random.fold_in(key, index), latents.shape[1:])
            )(keys)

        def step(lora, carried, inputs):
            index, is_trained, at = inputs
            x_t, runs = carried, None if stop is None else index <= stop
            is_copy = index >= num_steps
            if renoise:
                noise = draw_noise(num_rows + index)
                noisy = sd.scheduler.add_noise(jax.lax.stop_gradient(x_t), noise, at.alpha_bar)
                x_t = jnp.where(is_copy, noisy, x_t)
            factors = lora
            if lora_timesteps is not None:
                high, low = lora_timesteps
                factors = scale_lora(lora, (low <= at.timesteps) & (at.timesteps <= high))
            constants = (params["unet"], conditioning, at.timesteps)
            output = gated_denoise(is_trained, factors, x_t, constants, runs)
            noise = draw_noise(index) if eta > 0 else None
            x_prev = sd.scheduler.step(output, x_t, at, noise)
            if stop is not None:
                x_prev = jnp.where(runs, x_prev, x_t)
            if keep_latents:
                log_probs = jax.vmap(sd.scheduler.log_prob, (0, 0, 0, None))(
                    output, x_t, x_prev, at
                )
                return x_prev, (x_prev, log_probs)
            if not renoise:
                return x_prev, None
            return jnp.where(is_copy, carried, x_prev), x_prev

        inputs = (jnp.arange(num_rows), trained, jax.tree.map(jnp.asarray, rows))
        start, first = latents.astype(jnp.float32), 0
        if remat not in _KEEPS_ARGUMENTS_ALONE:
            first = steps_apart(never_trained, num_steps)
        if first:
            before = jax.tree.map(lambda x: x[:first], inputs)
            inputs = jax.tree.map(lambda x: x[first:], inputs)
            constant = jax.lax.stop_gradient(lora)
            start, _ = jax.lax.scan(functools.partial(step, constant), start, before)
            start = jax.lax.stop_gradient(start)
        x_0, after = jax.lax.scan(functools.partial(step, lora), start, inputs)
        if renoise:
            x_0 = interleave(x_0, *after[-renoise:])
        images = decode_latents(sd, params, x_0)
        if not keep_latents:
            return images
        visited, log_probs = jax.tree.map(lambda x: x.swapaxes(0, 1), after)
        return Trajectory(images, jnp.concatenate([latents[:, None], visited], 1), log_probs)

    return sample

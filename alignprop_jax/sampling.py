"""From noise and a prompt to images, differentiably: guidance and the scan over denoising steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from alignprop_jax.errors import UserError
from alignprop_jax.lora import scale_lora
from alignprop_jax.stable_diffusion import (
    Conditioning,
    Params,
    StableDiffusion,
    apply_unet,
    broadcast_to_batch,
    decode_latents,
)

REMAT_POLICIES = ("none", "step", "block")


def gate_gradient(denoise: Callable[..., Array], recompute: bool) -> Callable[..., Array]:
    """Makes the backward pass of one denoiser call optional, decided at run time.

    The forward pass is `denoise` whatever the gate. The backward pass is a branch: with an open
    gate it differentiates `denoise`, with a closed gate it returns zeros and evaluates nothing, so
    that in a scan over steps the cost falls with every closed gate, one compiled program serves
    every choice of them, and the gradient of a closed call is zero exactly.

    Args:
        denoise: `denoise(lora, x_t, constants) -> model_output`.
        recompute: only the arguments are kept for the backward pass, which evaluates `denoise`
            again; otherwise every activation is.

    Returns:
        `gated(gate, lora, x_t, constants)`, differentiable in `lora` and `x_t`. The constants
        have no gradient, and therefore cost none.
    """

    @jax.custom_vjp
    def gated(gate, lora, x_t, constants):
        del gate
        return denoise(lora, x_t, constants)

    def forward(gate, lora, x_t, constants):
        if recompute:
            return gated(gate, lora, x_t, constants), (gate, lora, x_t, constants)
        output, vjp = jax.vjp(lambda lora, x_t: denoise(lora, x_t, constants), lora, x_t)
        return output, (gate, lora, x_t, vjp)

    def backward(residuals, cotangent):
        gate, lora, x_t, kept = residuals

        def differentiate():
            if recompute:
                _, vjp = jax.vjp(lambda lora, x_t: denoise(lora, x_t, kept), lora, x_t)
                return vjp(cotangent)
            return kept(cotangent)

        zeros = jax.tree.map(jnp.zeros_like, (lora, x_t))
        lora_cotangent, x_cotangent = jax.lax.cond(gate, differentiate, lambda: zeros)
        return None, lora_cotangent, x_cotangent, None

    gated.defvjp(forward, backward)
    return gated


def interleave(first: Float[Array, "b *s"], second: Float[Array, "b *s"]) -> Float[Array, "2*b *s"]:
    """Merges two batches, image by image, so that a batch split over devices stays where it is."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])


def make_sampler(
    sd: StableDiffusion,
    num_steps: int,
    guidance_scale: float,
    eta: float = 0.0,
    remat: str = "step",
) -> Callable[..., Float[Array, "b H W 3"]]:
    """Builds the differentiable sampler of AlignProp (arXiv 2310.03739).

    Args:
        sd: the model.
        num_steps: number of denoising steps T.
        guidance_scale: weight w of classifier-free guidance, eps = u + w (c - u), Ho & Salimans,
            arXiv 2207.12598; 1 samples without guidance, at half the cost.
        eta: 0 for deterministic DDIM, 1 for DDPM's noise.
        remat: "step" and "block" evaluate each trained step again in the backward pass, "none"
            stores it. What "block" does besides is up to the modules, see `Execution`.

    Returns:
        `sample(params, lora, latents, conditioning, uncond, key, trained=None,
        lora_timesteps=None) -> images`, a pure function, see there.

    Raises:
        UserError: for a setting that the model's scheduler cannot follow.
    """
    if remat not in REMAT_POLICIES:
        raise UserError(f"remat is {remat!r}; supported: {', '.join(REMAT_POLICIES)}")
    guided = guidance_scale != 1.0
    steps = sd.scheduler.plan(num_steps, eta)
    recompute = remat != "none"

    def denoise(lora, x_t, constants):
        unet_params, conditioning, timestep = constants
        if recompute:
            # Weights that are split over devices are to be gathered here, layer by layer. XLA would
            # do so once for all steps, and keep them whole.
            unet_params, x_t = jax.lax.optimization_barrier((unet_params, x_t))
        variables = (
            {"params": unet_params} if lora is None else {"params": unet_params, "lora": lora}
        )
        if not guided:
            return apply_unet(sd, variables, x_t, timestep, conditioning)
        output = apply_unet(sd, variables, interleave(x_t, x_t), timestep, conditioning)
        unconditional, conditional = output[0::2], output[1::2]
        return unconditional + guidance_scale * (conditional - unconditional)

    gated_denoise = gate_gradient(denoise, recompute)

    def sample(
        params: Params,
        lora: PyTree | None,
        latents: Float[Array, "b h w c"],
        conditioning: Conditioning,
        uncond: Conditioning,
        key: Key[Array, "*b"],
        trained: Bool[Array, " t"] | None = None,
        lora_timesteps: tuple[Int[Array, ""], Int[Array, ""]] | None = None,
    ) -> Float[Array, "b H W 3"]:
        """Samples one image for each of the latents.

        Args:
            params: the frozen weights, "unet" and "vae".
            lora: the UNet's low-rank factors with their scale folded in; None for the base model.
            latents: standard normal noise.
            conditioning: the encoded prompts.
            uncond: the encoded negative prompts, one an image or one for all; not used without
                guidance.
            key: source of the noise that eta > 0 adds: one key, or one an image, which makes an
                image independent of the batch it is sampled in.
            trained: the steps at which the gradient enters the UNet; None for none. Elsewhere the
                UNet's output is a constant, while the latents keep their gradient, so that it
                crosses an untrained step along the linear terms of DDIM.
            lora_timesteps: the highest and the lowest timestep at which the UNet has the LoRA, both
                included; None for all. It is data: one compiled program serves every range.

        Returns:
            Images in [0, 1].
        """
        batch = latents.shape[0]
        if guided:
            uncond = broadcast_to_batch(uncond, batch)
            conditioning = jax.tree.map(interleave, uncond, conditioning)
        if trained is None:
            trained = jnp.zeros(num_steps, bool)
        keys = jax.random.split(key, batch) if key.ndim == 0 else key

        def step(x_t, inputs):
            index, is_trained, at = inputs
            factors = lora
            if lora_timesteps is not None:
                high, low = lora_timesteps
                factors = scale_lora(lora, (low <= at.timesteps) & (at.timesteps <= high))
            constants = (params["unet"], conditioning, at.timesteps)
            output = gated_denoise(is_trained, factors, x_t, constants)
            noise = None
            if eta > 0:
                noise = jax.vmap(
                    lambda key: jax.random.normal(jax.random.fold_in(key, index), x_t.shape[1:])
                )(keys)
            return sd.scheduler.step(output, x_t, at, noise), None

        inputs = (jnp.arange(num_steps), trained, jax.tree.map(jnp.asarray, steps))
        x_0, _ = jax.lax.scan(step, latents.astype(jnp.float32), inputs)
        return decode_latents(sd, params, x_0)

    return sample

"""One model and one reward on both sides: what gradients by JAX and by PyTorch are compared on."""

import copy
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from alignprop_jax.generators.stable_diffusion.generator import encode_prompts
from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.loading.tokenizer import tokenize
from alignprop_jax.lora.factors import init_lora
from tests.torch_pipeline import build_torch_pipeline, torch


class BothSides(NamedTuple):
    """A model with factors on both sides, and what to sample with it."""

    peer: object
    unet: object  # the peer's, with the factors in it
    factors: dict
    sd: object
    params: dict
    lora: dict
    latents: object
    context: object
    uncond: object
    keys: object


def build_both_sides(folder, prompts, num_steps):
    """Writes a pipeline and loads it, and factors, into PyTorch and into this package."""
    peer = build_torch_pipeline(folder)
    peer.scheduler.set_timesteps(num_steps)
    sd, params, (tokenizer,) = load_stable_diffusion(folder)
    lora = random_factors(params["unet"])
    unet = copy.deepcopy(peer.unet)
    factors = torch_lora(unet, lora)
    inputs = draw_inputs(sd, params, tokenizer, prompts, "a blurry fox")
    keys = jax.random.split(jax.random.key(3), len(prompts))
    return BothSides(peer, unet, factors, sd, params, lora, *inputs, keys)


def draw_inputs(sd, params, tokenizer, prompts, negative):
    """Latents, encoded prompts and encoded negative prompt."""
    encode = jax.jit(functools.partial(encode_prompts, sd))
    embedded = encode(params, [tokenize(tokenizer, [*prompts, negative])])
    latents = jax.random.normal(jax.random.key(0), (len(prompts), *sd.latent_shape))
    return latents, embedded[: len(prompts)], embedded[len(prompts) :]


def random_factors(unet_params):
    """LoRA factors that are all away from zero, so that all have a gradient."""
    factors = flatten_dict(init_lora(jax.random.key(1), unet_params, rank=2))
    for index, (path, value) in enumerate(factors.items()):
        if path[-1] == "up":
            key = jax.random.fold_in(jax.random.key(2), index)
            factors[path] = 0.1 * jax.random.normal(key, value.shape)
    return unflatten_dict(factors)


def to_torch(array):
    """NHWC to NCHW."""
    return torch.from_numpy(np.array(jnp.moveaxis(array, -1, 1)))


def cotangent(images):
    """A fixed linear reward with a different weight for every pixel."""
    rng = np.random.default_rng(5)
    return rng.standard_normal(images.shape, dtype=np.float32)


class TorchLinear(torch.nn.Module):
    """A linear layer of diffusers with factors of ours beside it."""

    def __init__(self, base, down, up):
        super().__init__()
        self.base, self.down, self.up = base, down, up

    def forward(self, x, *args):
        return self.base(x) + (x @ self.down) @ self.up


def torch_lora(unet, lora):
    """Puts factors into a diffusers UNet; returns them as tensors by path."""
    factors = {
        path: torch.from_numpy(np.array(value)).requires_grad_()
        for path, value in flatten_dict(lora).items()
    }
    for *path, leaf in factors:
        if leaf == "down":
            *parents, name = ".".join(path).split(".")
            parent = unet.get_submodule(".".join(parents))
            linear = TorchLinear(
                getattr(parent, name), factors[*path, "down"], factors[*path, "up"]
            )
            setattr(parent, name, linear)
    return factors


def assert_close_gradients(actual, wanted, atol=1e-4):
    scale = max(np.abs(value).max() for value in wanted.values())
    assert scale > 0
    for path, value in wanted.items():
        np.testing.assert_allclose(
            actual[path] / scale, value / scale, rtol=0, atol=atol, err_msg=".".join(path)
        )

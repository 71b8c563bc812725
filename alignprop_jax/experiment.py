"""What a config names, loaded and on the devices: model, prompts, reward."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from alignprop_jax import sharding
from alignprop_jax.algorithms.alignprop import PromptTable
from alignprop_jax.pretrained import load_stable_diffusion
from alignprop_jax.prompts import load_prompts, tokenize
from alignprop_jax.rewards import Reward, check_reward, make_reward
from alignprop_jax.sampling import Params, StableDiffusion, encode_prompts, make_sampler

# Prompts encoded at a time: the text encoder's activations of a long list would not fit.
_ENCODER_BATCH = 32

TRAIN, UNSEEN = "train", "unseen"


class Keys(NamedTuple):
    """The independent sources of randomness of a run."""

    lora: Key[Array, ""]
    train: Key[Array, ""]
    evaluation: Key[Array, ""]


def make_keys(seed: int) -> Keys:
    """Returns the keys of a seed."""
    return Keys(*jax.random.split(jax.random.key(seed), len(Keys._fields)))


@dataclasses.dataclass(frozen=True)
class Split:
    """A list of prompts and what the jitted programs know of them."""

    prompts: list[str]
    table: PromptTable


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The frozen parts of a run; their arrays are on every device of the mesh."""

    mesh: Mesh
    sd: StableDiffusion
    params: Params
    reward: Reward
    sample: Callable[..., Float[Array, "b H W 3"]]
    splits: dict[str, Split]


def load_experiment(config: ConfigDict) -> Experiment:
    """Loads a validated config.

    The text encoder runs here, once for every prompt, and is not kept.

    Raises:
      UserError: the model, the prompts or the reward cannot be loaded or do not fit together.
    """
    mesh = sharding.make_mesh()
    # What is quick to find wrong comes before weights are read.
    prompts = {TRAIN: load_prompts(config.prompts), UNSEEN: load_prompts(config.eval_prompts)}
    dtype = jnp.dtype(config.dtype)
    sd, params, tokenizer = load_stable_diffusion(config.model, dtype)
    sampler = config.sampler
    sample = make_sampler(sd, sampler.num_steps, sampler.guidance_scale, sampler.eta, config.remat)
    reward = make_reward(config.reward, tokenizer, _reward_options(config, dtype))
    check_reward(reward, image_shape(sd))
    contexts = encode(sd, params, tokenizer, [config.negative_prompt, *sum(prompts.values(), [])])
    uncond, contexts = contexts[:1], contexts[1:]
    everywhere = sharding.replicated(mesh)
    splits = {}
    for name, texts in prompts.items():
        context, contexts = contexts[: len(texts)], contexts[len(texts) :]
        table = PromptTable(context, uncond, reward.prepare(texts))
        splits[name] = Split(texts, jax.device_put(table, everywhere))
    frozen = {"unet": params["unet"], "vae": params["vae"]}
    return Experiment(
        mesh=mesh,
        sd=sd,
        params=jax.device_put(frozen, everywhere),
        reward=dataclasses.replace(reward, params=jax.device_put(reward.params, everywhere)),
        sample=sample,
        splits=splits,
    )


def _reward_options(config: ConfigDict, dtype: jnp.dtype) -> dict[str, dict[str, Any]]:
    """The arguments of every registered reward's factory."""
    networks = ("aesthetic", "clip_score", "count", "hps", "pickscore", "remove")
    options = {name: {**config[name].to_dict(), "dtype": dtype} for name in networks}
    return options | dict.fromkeys(("jpeg_compress", "jpeg_incompress"), config.jpeg.to_dict())


def image_shape(sd: StableDiffusion) -> tuple[int, int, int]:
    """Height, width and channels of the images a model makes."""
    height, width, _ = sd.latent_shape
    scale = sd.vae.config.downscale
    return (height * scale, width * scale, 3)


def encode(
    sd: StableDiffusion, params: Params, tokenizer: Any, prompts: list[str]
) -> Float[Array, "p l d"]:
    """Returns the text encoder's output for every prompt; a prompt said twice is encoded once."""
    distinct = list(dict.fromkeys(prompts))
    ids = jnp.asarray(tokenize(tokenizer, distinct))

    @jax.jit
    def encode_all(text_params, ids):
        def encode_one(row):
            return encode_prompts(sd, {"text_encoder": text_params}, row[None])[0]

        return jax.lax.map(encode_one, ids, batch_size=min(_ENCODER_BATCH, len(distinct)))

    contexts = encode_all(params["text_encoder"], ids)
    return contexts[np.array([distinct.index(prompt) for prompt in prompts])]

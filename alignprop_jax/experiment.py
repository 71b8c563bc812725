"""What a config names, loaded and on the devices: model, prompts, reward."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from alignprop_jax.algorithms.batches import PromptTable
from alignprop_jax.algorithms.presets import WITHOUT_REWARD_GRADIENT
from alignprop_jax.config import gradient_path
from alignprop_jax.devices import sharding
from alignprop_jax.diffusion.remat import bytes_kept_of, choose_remat, device_memory
from alignprop_jax.diffusion.sampling import make_sampler, steps_apart
from alignprop_jax.diffusion.stable_diffusion import (
    TEXT_ENCODERS,
    Conditioning,
    Params,
    StableDiffusion,
    encode_prompts,
)
from alignprop_jax.loading.pretrained import load_stable_diffusion, open_model
from alignprop_jax.loading.shapes_only import compute
from alignprop_jax.loading.tokenizer import tokenize
from alignprop_jax.models.execution import Execution
from alignprop_jax.prompts.reading import load_prompts
from alignprop_jax.rewards import Reward, check_reward, make_reward

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
    """The frozen parts of a run; their arrays lie on the mesh."""

    mesh: Mesh
    sd: StableDiffusion
    params: Params
    reward: Reward
    sample: Callable[..., Float[Array, "b H W 3"]]
    remat: str  # of `sampling.REMAT_POLICIES`
    splits: dict[str, Split]

    @property
    def prompts(self) -> list[str]:
        """Of all splits."""
        return [prompt for split in self.splits.values() for prompt in split.prompts]


def load_experiment(config: ConfigDict, mesh: Mesh | None = None) -> Experiment:
    """Loads a validated config.

    The text encoder runs here, once for every prompt, and is not kept.

    Args:
      mesh: of the devices to use; None for all of them, as `config.mesh` says.

    Raises:
      UserError: the model, the prompts or the reward cannot be loaded or do not fit together.
    """
    mesh = mesh or sharding.make_mesh(config.mesh.fsdp)
    # What is quick to find wrong comes before weights are read.
    prompts = {TRAIN: load_prompts(config.prompts), UNSEEN: load_prompts(config.eval_prompts)}
    dtype = jnp.dtype(config.dtype)
    attend = sharding.choose_attention(config.attention, mesh)
    execution = Execution(dtype, attend)
    size = (config.sampler.height, config.sampler.width)
    shardings_of = functools.partial(sharding.of_frozen, mesh=mesh)
    sd, params, tokenizers = load_stable_diffusion(config.model, execution, size, shardings_of)
    reward = make_reward(config.reward, tokenizers[0], _reward_options(config, dtype))
    texts = sum(prompts.values(), [])
    inputs = reward.prepare(texts)
    check_reward(reward, sd.image_shape, config.algorithm not in WITHOUT_REWARD_GRADIENT, inputs)
    encoded = encode(sd, params, tokenizers, [config.negative_prompt, *texts])
    remat = _remat(config, sd, params["unet"], encoded[:1], mesh)
    if remat == "block":
        sd = sd.rematerialized()
    everywhere = sharding.replicated(mesh)
    splits, start = {}, 0
    for name, of_split in prompts.items():
        rows = slice(start, start + len(of_split))
        of_reward = jax.tree.map(operator.itemgetter(rows), inputs)
        table = PromptTable(encoded[1:][rows], encoded[:1], of_reward)
        splits[name] = Split(of_split, sharding.put(table, everywhere))
        start = rows.stop
    reward_params = sharding.put(reward.params, sharding.of_frozen(reward.params, mesh))
    return Experiment(
        mesh=mesh,
        sd=sd,
        params={"unet": params["unet"], "vae": params["vae"]},
        reward=dataclasses.replace(reward, params=reward_params),
        sample=sampler_of(config, sd, remat),
        remat=remat,
        splits=splits,
    )


def sampler_of(config: ConfigDict, sd: StableDiffusion, remat: str) -> Callable[..., Any]:
    """The sampler that a config describes, of a model; see `sampling.make_sampler`."""
    sampler = config.sampler
    return make_sampler(
        sd,
        sampler.num_steps,
        sampler.guidance_scale,
        sampler.eta,
        remat,
        config.gradient.detach_input,
        share=config.algorithm not in WITHOUT_REWARD_GRADIENT,
    )


def _remat(
    config: ConfigDict, sd: StableDiffusion, unet_params: Any, prompt: Conditioning, mesh: Mesh
) -> str:
    """The config's, or the best for the memory of the mesh's devices."""
    if config.remat != "auto":
        return config.remat
    if mesh.shape["fsdp"] > 1:
        # Where a step is evaluated again, split weights are gathered; else once for all steps.
        return "block"
    images = (config.train.microbatch_size or config.train.batch_size) / mesh.size
    images *= 1 if config.sampler.guidance_scale == 1 else 2
    kept = images * bytes_kept_of(sd, unet_params, prompt)
    path, num_steps = gradient_path(config), config.sampler.num_steps
    if config.algorithm in WITHOUT_REWARD_GRADIENT:
        num_kept = trained_steps = num_steps
    else:
        apart = steps_apart(path.never_trained(num_steps), num_steps)
        num_kept = num_steps - apart + path.renoise
        trained_steps = path.truncation.expected_steps(num_steps) + path.renoise
    return choose_remat(kept, num_kept, trained_steps, device_memory(mesh))


def load_reward(config: ConfigDict, name: str, experiment: Experiment) -> Reward:
    """Makes another reward than the config's, with the options that the config has for it.

    Args:
        experiment: of the config, whose samples it is to score.

    Raises:
        UserError: there is no such reward, it cannot be made, or it gives no score an image.
    """
    tokenizer = open_model(config.model).tokenizer("tokenizer")
    reward = make_reward(name, tokenizer, _reward_options(config, jnp.dtype(config.dtype)))
    inputs = reward.prepare(experiment.prompts)
    check_reward(reward, experiment.sd.image_shape, differentiable=False, inputs=inputs)
    return reward


def _reward_options(config: ConfigDict, dtype: jnp.dtype) -> dict[str, dict[str, Any]]:
    """The arguments of every registered reward's factory."""
    networks = ("aesthetic", "clip_score", "count", "hps", "pickscore", "remove")
    options = {name: {**config[name].to_dict(), "dtype": dtype} for name in networks}
    files = ("jpeg_compress", "jpeg_incompress", "jpeg_compress_file", "jpeg_incompress_file")
    return options | dict.fromkeys(files, config.jpeg.to_dict())


def encode(
    sd: StableDiffusion, params: Params, tokenizers: Sequence[Any], prompts: list[str]
) -> Conditioning:
    """Encodes every prompt; one that is said twice is encoded once.

    Args:
        tokenizers: one for each text encoder.
    """
    distinct = list(dict.fromkeys(prompts))
    ids = [tokenize(tokenizer, distinct) for tokenizer in tokenizers]
    text_params = {name: params[name] for name in TEXT_ENCODERS if name in params}

    def encode_all(text_params, ids):
        def encode_one(ids):
            rows = [row[None] for row in ids]
            return jax.tree.map(lambda x: x[0], encode_prompts(sd, text_params, rows))

        return jax.lax.map(encode_one, ids, batch_size=min(_ENCODER_BATCH, len(distinct)))

    # On the host, where it is taken apart and put together without a program for each.
    encoded = jax.device_get(compute(encode_all, text_params, ids))
    if sd.zero_empty_prompts:
        said = np.array([bool(prompt) for prompt in distinct])
        encoded = jax.tree.map(
            lambda x: x * said.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype), encoded
        )
    return encoded[np.array([distinct.index(prompt) for prompt in prompts])]

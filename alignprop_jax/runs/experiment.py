"""What a config names, loaded and on the devices: model, prompts, reward."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree
from ml_collections import ConfigDict

from alignprop_jax.algorithms.base import Algorithm, PromptTable
from alignprop_jax.core.chain import Chain
from alignprop_jax.core.generator import Generator
from alignprop_jax.core.remat import bytes_kept_of, choose_remat, device_memory
from alignprop_jax.devices import sharding
from alignprop_jax.generators.load import load_generator
from alignprop_jax.generators.loaded import Loaded
from alignprop_jax.generators.stable_diffusion.load import open_model
from alignprop_jax.lora.factors import LoraTree
from alignprop_jax.lora.names import adapts_text
from alignprop_jax.nn.execution import Execution
from alignprop_jax.prompts.reading import load_prompts
from alignprop_jax.prompts.splits import TRAIN, UNSEEN
from alignprop_jax.rewards import Reward, check_reward, make_reward
from alignprop_jax.runs.settings import algorithm_of


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
    algorithm: Algorithm
    chain: Chain
    params: Any  # of the chain's generator
    reward: Reward
    splits: dict[str, Split]
    splits_of_loras: tuple[dict[str, Split], ...] = ()  # prompts encoded with each LoRA

    @property
    def generator(self) -> Generator:
        """What is tuned."""
        return self.chain.generator

    @property
    def weights(self) -> Any:
        """Those of the network, which an adapter changes."""
        return self.generator.network(self.params)

    @property
    def prompts(self) -> list[str]:
        """Of all splits."""
        return [prompt for split in self.splits.values() for prompt in split.prompts]


def load_experiment(
    config: ConfigDict,
    mesh: Mesh | None = None,
    loras: Sequence[LoraTree | None] = (None,),
) -> Experiment:
    """Loads a validated config.

    The text encoder runs here, once for every prompt, and is not kept.

    Args:
      mesh: of the devices to use; None for all of them, as `config.mesh` says.
      loras: with which prompts are encoded, each by part of the model; None for no LoRA. The
        experiment's `splits` are those of the first.

    Raises:
      UserError: the model, the prompts or the reward cannot be loaded or do not fit together.
    """
    mesh = mesh or sharding.make_mesh(config.mesh.fsdp)
    # What is quick to find wrong comes before weights are read.
    prompts = {TRAIN: load_prompts(config.prompts), UNSEEN: load_prompts(config.eval_prompts)}
    algorithm = algorithm_of(config)
    dtype = jnp.dtype(config.dtype)
    execution = Execution(dtype, sharding.choose_attention(config.attention, mesh))
    size = (config.sampler.height, config.sampler.width)
    shardings_of = functools.partial(sharding.of_frozen, mesh=mesh)
    loaded = load_generator(config.model, execution, size, shardings_of)
    generator = loaded.generator
    reward = make_reward(config.reward, loaded.tokenizer, config, dtype)
    texts = sum(prompts.values(), [])
    reward_inputs = reward.prepare(texts)
    check_reward(reward, generator.sample_shape, algorithm.needs_reward_gradient, reward_inputs)
    everywhere = sharding.replicated(mesh)

    def rows(tree, start, stop):
        return jax.tree.map(lambda x: x[start:stop], tree)

    def encode_splits(lora: LoraTree | None) -> dict[str, Split]:
        encoded = loaded.encode([config.negative_prompt, *texts], lora)
        splits, start = {}, 0
        for name, of_split in prompts.items():
            stop = start + len(of_split)
            table = PromptTable(
                rows(encoded, 1 + start, 1 + stop),
                rows(encoded, 0, 1),
                rows(reward_inputs, start, stop),
            )
            splits[name] = Split(of_split, sharding.put(table, everywhere))
            start = stop
        return splits

    splits_of_loras = _for_each_text_part(loras, encode_splits)
    splits = splits_of_loras[0]
    remat = _remat(config, algorithm, loaded, splits[TRAIN].table.negative, mesh)
    if remat == "block":
        generator = generator.rematerialized()
    reward_params = sharding.put(reward.params, sharding.of_frozen(reward.params, mesh))
    sampler = config.sampler
    return Experiment(
        mesh=mesh,
        algorithm=algorithm,
        chain=Chain(
            generator,
            sampler.num_steps,
            generator.guidance(sampler.guidance_scale, algorithm.shares_guidance),
            sampler.eta,
            remat,
            algorithm.detaches_input,
        ),
        params=loaded.params,
        reward=dataclasses.replace(reward, params=reward_params),
        splits=splits,
        splits_of_loras=splits_of_loras,
    )


def _for_each_text_part(
    loras: Sequence[LoraTree | None], encode_splits: Callable[[LoraTree | None], dict[str, Split]]
) -> tuple[dict[str, Split], ...]:
    """Encodes prompts with each LoRA; once for all that leave the text encoders as they are."""
    plain = functools.cache(lambda: encode_splits(None))
    return tuple(encode_splits(lora) if adapts_text(lora) else plain() for lora in loras)


def _remat(
    config: ConfigDict, algorithm: Algorithm, loaded: Loaded, prompt: PyTree, mesh: Mesh
) -> str:
    """The config's, or the best for the memory of the mesh's devices."""
    if config.remat != "auto":
        return config.remat
    if mesh.shape["fsdp"] > 1:
        # Where a step is evaluated again, split weights are gathered; else once for all steps.
        return "block"
    images = (config.train.microbatch_size or config.train.batch_size) / mesh.size
    images *= 1 if config.sampler.guidance_scale == 1 else 2
    generator = loaded.generator
    weights = generator.network(loaded.params)
    kept = images * bytes_kept_of(generator.on_one_device(), weights, prompt)
    return choose_remat(kept, *algorithm.steps_kept(config.sampler.num_steps), device_memory(mesh))


def load_reward(config: ConfigDict, name: str, experiment: Experiment) -> Reward:
    """Makes another reward than the config's, with the options that the config has for it.

    Args:
        experiment: of the config, whose samples it is to score.

    Raises:
        UserError: there is no such reward, it cannot be made, or it gives no score an image.
    """
    tokenizer = open_model(config.model).tokenizer("tokenizer")
    reward = make_reward(name, tokenizer, config, jnp.dtype(config.dtype))
    inputs = reward.prepare(experiment.prompts)
    shape = experiment.generator.sample_shape
    check_reward(reward, shape, differentiable=False, inputs=inputs)
    return reward

"""Loads a Stable Diffusion: from a folder, a single file or the hub."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion import pipeline_defaults
from alignprop_jax.generators.stable_diffusion.generator import TEXT_ENCODERS, StableDiffusion
from alignprop_jax.generators.stable_diffusion.single_file import SingleFileSource
from alignprop_jax.generators.stable_diffusion.unet import UNet, UNetConfig
from alignprop_jax.loading import hub
from alignprop_jax.loading.pretrained import abstract_params, locate_model
from alignprop_jax.loading.sources import FolderSource, ModelSource
from alignprop_jax.loading.weights import ParamTree
from alignprop_jax.nn.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from alignprop_jax.nn.execution import Execution
from alignprop_jax.nn.vae import AutoencoderKL, VAEConfig

_IN_FLOAT32 = Execution()


def open_model(model: str | Path) -> ModelSource:
    """Where a pipeline's parts are read from; weights are read when they are asked for.

    Args:
        model: as for `pretrained.locate_model`.

    Raises:
        UserError: there is no such model, or it cannot be had.
    """
    path, variant = locate_model(model, hub.download_model)
    return SingleFileSource(path) if os.path.isfile(path) else FolderSource(path, variant)


def load_stable_diffusion(
    model: str | Path,
    execution: Execution = _IN_FLOAT32,
    image_size: tuple[int, int] = (0, 0),
    shardings_of: Callable[[ParamTree], Any] | None = None,
) -> tuple[StableDiffusion, dict[str, ParamTree], list[Any]]:
    """Loads a Stable Diffusion 1.x, 2.x or XL pipeline.

    Args:
        model: as for `open_model`.
        execution: how the modules are computed; its dtype is that of their weights too. The
            autoencoder of a Stable Diffusion XL has float32 where its file asks for that: its
            activations need the precision.
        image_size: height and width of the images in pixels; 0 for those of the model.
        shardings_of: tells from the shapes of the unet's or the vae's weights how they lie on the
            devices; they are read straight to there. The text encoders', which are soon not needed
            any more, lie on the first device, and so do all when it is None.

    Returns:
        The modules with the scheduler; their weights by component ("unet", "vae", "text_encoder"
        and, of a Stable Diffusion XL, "text_encoder_2"); and a tokenizer for each text encoder.

    Raises:
        UserError: a component is missing, not supported or damaged. The message names it.
    """
    source = open_model(model)
    is_xl = source.has("text_encoder_2")

    def read(component: str, parse: Callable[..., Any]) -> Any:
        return source.config(component, functools.partial(parse, is_xl=is_xl))

    # First of all, as what is of another pipeline may lack any other part.
    zero_empty_prompts = False
    if is_xl or source.has("model_index"):
        zero_empty_prompts = read("model_index", pipeline_defaults.read_model_index)
    unet = UNet(read("unet", pipeline_defaults.read_unet), execution)
    vae_config = source.config("vae", pipeline_defaults.read_vae)
    in_float32 = dataclasses.replace(execution, dtype=jnp.dtype("float32"))
    vae_execution = in_float32 if is_xl and vae_config.force_upcast else execution
    modules = {
        "unet": unet,
        "vae": AutoencoderKL(vae_config, vae_execution),
        "text_encoder": CLIPTextModel(
            read("text_encoder", pipeline_defaults.read_text_encoder), execution
        ),
    }
    if is_xl:
        modules["text_encoder_2"] = CLIPTextModelWithProjection(
            read("text_encoder_2", pipeline_defaults.read_text_encoder), execution
        )
    scheduler = read("scheduler", pipeline_defaults.read_scheduler)
    text_encoders = tuple(modules[name] for name in TEXT_ENCODERS if name in modules)
    _check_channels(source, unet.config, vae_config)
    _check_conditioning(source, unet.config, [encoder.config for encoder in text_encoders])
    _check_size(source, unet.config, image_size)
    sd = StableDiffusion(
        unet,
        modules["vae"],
        text_encoders,
        scheduler,
        image_size,
        zero_empty_prompts,
    )
    tokenizers = [source.tokenizer("tokenizer")]
    if is_xl:
        tokenizers.append(source.tokenizer("tokenizer_2"))
    params = {}
    for name, module in modules.items():
        abstract = abstract_params(module)
        if shardings_of is not None and name not in TEXT_ENCODERS:
            abstract = jax.tree.map(
                lambda leaf, sharding: leaf.update(sharding=sharding),
                abstract,
                shardings_of(abstract),
            )
        params[name] = source.params(name, abstract, module.dtype)
    return sd, params, tokenizers


def adaptable_shapes(model: str | Path) -> dict[str, ParamTree]:
    """The shapes of the parts of a pipeline that a LoRA may adapt: UNet and text encoders.

    Args:
        model: as for `open_model`.

    Raises:
        UserError: as `load_stable_diffusion`.
    """
    source = open_model(model)
    unet = UNet(source.config("unet", UNetConfig.from_dict))
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    modules = {
        name: module(source.config(name, CLIPTextConfig.from_dict))
        for name, module in encoders.items()
        if source.has(name)
    }
    return {name: abstract_params(module) for name, module in {"unet": unet, **modules}.items()}


def _check_channels(source: ModelSource, unet: UNetConfig, vae: VAEConfig) -> None:
    if unet.in_channels != vae.latent_channels:
        raise UserError(
            f"{source}: the unet takes {unet.in_channels} channels, the vae's latents have "
            f"{vae.latent_channels}; models for inpainting and other conditions than text are not "
            "supported"
        )
    if unet.out_channels != unet.in_channels:
        raise UserError(
            f"{source}: the unet gives {unet.out_channels} channels for {unet.in_channels}; models "
            "that predict a variance are not supported"
        )


def _check_size(source: ModelSource, unet: UNetConfig, image_size: tuple[int, int]) -> None:
    """Whether the size of the model's own images goes through all levels, where it is used."""
    unit = 2 ** (len(unet.channels) - 1)
    if not all(image_size) and unet.sample_size % unit:
        raise UserError(
            f"{source}: the unet's sample_size={unet.sample_size} is no multiple of {unit}, which "
            "its levels need; give a height and a width"
        )


def _check_conditioning(
    source: ModelSource, unet: UNetConfig, text_encoders: Sequence[CLIPTextConfig]
) -> None:
    width = sum(config.hidden_size for config in text_encoders)
    if unet.context_dim != width:
        raise UserError(
            f"{source}: the unet attends to vectors of size {unet.context_dim}, "
            f"the text encoders give {width}"
        )
    pooled = text_encoders[1].projection_dim if len(text_encoders) > 1 else 0
    if pooled and unet.pooled_dim == pooled - unet.size_embedding_dim:
        raise UserError(
            f"{source}: the unet is told five numbers beside the text, as the refiner of Stable "
            "Diffusion XL; give the base model"
        )
    if unet.pooled_dim != pooled:
        raise UserError(
            f"{source}: the unet takes a pooled text of size {unet.pooled_dim}, "
            f"text_encoder_2 gives {pooled}"
        )

"""Models as people have them: diffusers pipelines, single files and transformers CLIPs."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from alignprop_jax.diffusion.stable_diffusion import TEXT_ENCODERS, StableDiffusion
from alignprop_jax.errors import UserError
from alignprop_jax.loading import hub, pipeline_defaults
from alignprop_jax.loading.single_file import SUFFIXES, SingleFileSource
from alignprop_jax.loading.sources import FolderSource, ModelSource
from alignprop_jax.loading.weights import ParamTree
from alignprop_jax.models.clip import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)
from alignprop_jax.models.execution import Execution
from alignprop_jax.models.owlvit import OwlViT, OwlViTConfig
from alignprop_jax.models.unet import NUM_TIME_IDS, UNet, UNetConfig
from alignprop_jax.models.vae import AutoencoderKL, VAEConfig

ASSETS = Path(__file__).parents[1] / "assets"
EMOJI = "emoji"

_CONFIG_CLASSES = {
    UNet: UNetConfig,
    AutoencoderKL: VAEConfig,
    CLIPTextModel: CLIPTextConfig,
    CLIPTextModelWithProjection: CLIPTextConfig,
    CLIPModel: CLIPConfig,
    OwlViT: OwlViTConfig,
}

_IN_FLOAT32 = Execution()


def open_model(model: str | Path) -> ModelSource:
    """Where a pipeline's parts are read from; weights are read when they are asked for.

    Args:
        model: a diffusers folder, a single-file checkpoint, `emoji` for the model in the package,
            or on the Hugging Face hub OWNER/NAME[@REVISION] or OWNER/NAME[@REVISION]/FILE, which
            is downloaded (once). A folder or a hub id may end in :VARIANT of its weights, such as
            :fp16; a part that has none of it is read without.

    Raises:
        UserError: there is no such model, or it cannot be had.
    """
    path, variant = _locate(model, hub.download_model)
    return SingleFileSource(path) if os.path.isfile(path) else FolderSource(path, variant)


def resolve_model(
    model: str | Path, download: Callable[[hub.HubName], Path] = hub.download_model
) -> Path:
    """The local folder of a model.

    Args:
        model: as for `open_model`, but no file.
        download: gets what is needed from the hub.

    Raises:
        UserError: there is no such model, or it cannot be had.
    """
    path, _ = _locate(model, download)
    if os.path.isfile(path):
        raise UserError(f"{model}: a folder is needed here, and this is a file")
    return path


def _locate(model: str | Path, download: Callable[[hub.HubName], Path]) -> tuple[Path, str | None]:
    """The folder or file of a model, and the variant of its weights if one was asked for."""
    if str(model) == EMOJI:
        folder = ASSETS / EMOJI
        if not folder.is_dir():
            raise UserError(
                f"{folder}: the model of the package is missing; install the package again"
            )
        return folder, None
    # Of a name that is too long, or of nobody's home, these say no where Path raises.
    path = Path(os.path.expanduser(model))
    if os.path.exists(path):
        return path, None
    before, _, variant = str(path).rpartition(":")
    if variant and os.path.isdir(before):
        return Path(before), variant
    name = hub.HubName.parse(str(model))
    # A path that is mistyped may look like a hub id, whose last part is a file where it ends so.
    if name is None or (Path(str(model)).suffix in SUFFIXES) != bool(name.file):
        raise UserError(
            f"{model}: no such folder or file; a model is a diffusers folder, a single file, "
            f"a hub id or {EMOJI}"
        )
    if name.file:
        return hub.download_file(str(model)), None
    return download(name), name.variant


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


def resolve_network(model: str | Path, emoji_part: str) -> Path:
    """The local folder of one network of transformers, as `resolve_model` finds it.

    Args:
        emoji_part: the folder that `emoji`, which holds several, means here.
    """
    folder = resolve_model(model)
    return folder / emoji_part if str(model) == EMOJI else folder


def resolve_tokenizer(model: str | Path) -> Path:
    """The local folder of a tokenizer: of its own, of a CLIP, or within a pipeline."""
    folder = resolve_model(model, hub.download_tokenizer)
    return folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder


def load_component(
    module_class: type[nn.Module], folder: Path, dtype: Any = jnp.float32
) -> tuple[nn.Module, ParamTree]:
    """Loads the one model in `folder`, built from its config.json.

    Raises:
        UserError: a file is missing, not supported or damaged. The message names it.
    """
    source = FolderSource(folder)
    config = source.config("", _CONFIG_CLASSES[module_class].from_dict)
    module = module_class(config, Execution(jnp.dtype(dtype)))
    return module, source.params("", abstract_params(module), dtype)


def abstract_component(module_class: type[nn.Module], folder: Path) -> ParamTree:
    """The shapes of the one model in `folder`; UserError where its config cannot be read."""
    config = FolderSource(folder).config("", _CONFIG_CLASSES[module_class].from_dict)
    return abstract_params(module_class(config))


def abstract_params(module: nn.Module) -> ParamTree:
    """The parameters of a model of this package as `jax.ShapeDtypeStruct`s, allocating nothing."""
    # The shapes are the same however it is computed; over devices, one image could not be.
    module = module.clone(execution=_IN_FLOAT32)
    return jax.eval_shape(module.init, jax.random.key(0), *example_inputs(module))["params"]


def initial_params(module: nn.Module, seed: int) -> ParamTree:
    """Random parameters of a model of this package, to train it from."""
    inputs = [jnp.zeros(x.shape, x.dtype) for x in example_inputs(module)]
    return jax.jit(module.init)(jax.random.key(seed), *inputs)["params"]


def example_inputs(module: nn.Module) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The smallest inputs, as shapes, with which a model of this package can be initialised."""
    config = module.config

    def images(size: int, channels: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)

    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    match module:
        case UNet():
            sample = images(2 ** (len(config.channels) - 1), config.in_channels)
            timesteps = jax.ShapeDtypeStruct((1,), jnp.int32)
            context = jax.ShapeDtypeStruct((1, 1, config.context_dim), jnp.float32)
            if not config.pooled_dim:
                return sample, timesteps, context
            pooled = jax.ShapeDtypeStruct((1, config.pooled_dim), jnp.float32)
            time_ids = jax.ShapeDtypeStruct((1, NUM_TIME_IDS), jnp.float32)
            return sample, timesteps, context, pooled, time_ids
        case AutoencoderKL():
            return (images(config.downscale, config.in_channels),)
        case CLIPTextModel() | CLIPTextModelWithProjection():
            return (tokens,)
        case CLIPModel() | OwlViT():
            return tokens, images(config.vision.image_size, 3)
        case _:
            raise TypeError(f"not a model of this package: {type(module).__name__}")

"""Where a model is that people name, and networks that lie in a folder of their own."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from alignprop_jax.errors import UserError
from alignprop_jax.loading import hub
from alignprop_jax.loading.sources import FolderSource
from alignprop_jax.loading.weights import ParamTree
from alignprop_jax.nn.execution import Execution

ASSETS = Path(__file__).parents[1] / "assets"
EMOJI = "emoji"
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Of files that hold a whole model."""

_IN_FLOAT32 = Execution()


def resolve_model(
    model: str | Path, download: Callable[[hub.HubName], Path] = hub.download_model
) -> Path:
    """The local folder of a model.

    Args:
        model: as for `locate_model`, but no file.
        download: gets what is needed from the hub.

    Raises:
        UserError: there is no such model, or it cannot be had.
    """
    path, _ = locate_model(model, download)
    if os.path.isfile(path):
        raise UserError(f"{model}: a folder is needed here, and this is a file")
    return path


def locate_model(
    model: str | Path, download: Callable[[hub.HubName], Path]
) -> tuple[Path, str | None]:
    """The folder or file of a model, and the variant of its weights if one was asked for.

    Args:
        model: a diffusers folder, a single-file checkpoint, `emoji` for the model in the package,
            or on the Hugging Face hub OWNER/NAME[@REVISION] or OWNER/NAME[@REVISION]/FILE, which
            is downloaded (once). A folder or a hub id may end in :VARIANT of its weights, such as
            :fp16; a part that has none of it is read without.
        download: gets what is needed from the hub.

    Raises:
        UserError: there is no such model, or it cannot be had.
    """
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


<<<<<<< HEAD
=======
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
    unet = UNet(source.config("unet", UNetConfig.from_dict), execution)
    vae_config = source.config("vae", VAEConfig.from_dict)
    in_float32 = dataclasses.replace(execution, dtype=jnp.dtype("float32"))
    vae_execution = in_float32 if is_xl and vae_config.force_upcast else execution
    modules = {
        "unet": unet,
        "vae": AutoencoderKL(vae_config, vae_execution),
        "text_encoder": CLIPTextModel(
            source.config("text_encoder", CLIPTextConfig.from_dict), execution
        ),
    }
    if is_xl:
        modules["text_encoder_2"] = CLIPTextModelWithProjection(
            source.config("text_encoder_2", CLIPTextConfig.from_dict), execution
        )
    scheduler = source.config("scheduler", DDIMScheduler.from_config)
    text_encoders = tuple(modules[name] for name in TEXT_ENCODERS if name in modules)
    _check_channels(source, unet.config, vae_config)
    _check_conditioning(source, unet.config, [encoder.config for encoder in text_encoders])
    sd = StableDiffusion(
        unet,
        modules["vae"],
        text_encoders,
        scheduler,
        image_size,
        is_xl and source.config("model_index", _zeroes_empty_prompts),
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
    if unet.pooled_dim != pooled:
        raise UserError(
            f"{source}: the unet takes a pooled text of size {unet.pooled_dim}, "
            f"text_encoder_2 gives {pooled}"
        )


def _zeroes_empty_prompts(model_index: Mapping[str, Any]) -> bool:
    return model_index.get("force_zeros_for_empty_prompt", True)


>>>>>>> refs/heads/lora
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
    config_class = module_class.__annotations__["config"]
    config = source.config("", config_class.from_dict)
    module = module_class(config, Execution(jnp.dtype(dtype)))
    return module, source.params("", abstract_params(module), dtype)


def abstract_params(module: nn.Module) -> ParamTree:
    """The parameters of a model of this package as `jax.ShapeDtypeStruct`s, allocating nothing."""
    # The shapes are the same however it is computed; over devices, one image could not be.
    module = module.clone(execution=_IN_FLOAT32)
    return jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]


def initial_params(module: nn.Module, seed: int) -> ParamTree:
    """Random parameters of a model of this package, to train it from."""
    inputs = [jnp.zeros(x.shape, x.dtype) for x in module.example_inputs()]
    return jax.jit(module.init)(jax.random.key(seed), *inputs)["params"]

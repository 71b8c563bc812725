"""What diffusers' pipelines, and not the parts themselves, make of the parts' configs.

StableDiffusionPipeline corrects values that old files have or lack, StableDiffusionXLPipeline
hardly any; both say how big an image is by default, and what the pipeline's own file may ask for.
Each function here reads one config as the pipelines of diffusers 0.42 do, and says in a note what
it departs from in the file.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from alignprop_jax.errors import UserError, note
from alignprop_jax.generators.stable_diffusion.unet import UNetConfig
from alignprop_jax.inputs.foreign_json import (
    boolean,
    either,
    list_of,
    optional,
    read_fields,
    shorten,
    text,
)
from alignprop_jax.nn.clip import CLIPTextConfig
from alignprop_jax.nn.vae import VAEConfig
from alignprop_jax.processes.ddim import DDIMScheduler

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_FLAG = optional(boolean(default=False))
_MODEL_INDEX = {
    # The class alone, or that of a pipeline whose code is in the folder, behind its file.
    "_class_name": optional(either(text(), list_of(text(), 2, 2), default=None)),
    "requires_aesthetics_score": _FLAG,
    "force_zeros_for_empty_prompt": dataclasses.replace(_FLAG, default=True),
}
_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
# Schedulers whose own default is to clip; those of the others do not know the key, or have it off.
_CLIPPING = tuple(f"{name}Scheduler" for name in ("DDIM", "DDPM", "DDIMParallel", "DDPMParallel"))
# A side of the latents where the UNet's file does not say it.
_SIDE, _SIDE_OF_XL = 64, 128
_OLD_VERSION = re.compile(r"0\.[0-8](\.|$)")


def read_model_index(config: Mapping[str, Any], is_xl: bool) -> bool:
    """Reads model_index.json.

    Returns:
        Whether the UNet sees zeros in place of an empty prompt.

    Raises:
        UserError: the pipeline has a part of a class that is not implemented, or its UNet is told
            of the score of a picture (the refiner of Stable Diffusion XL).
    """
    said = read_fields(config, _MODEL_INDEX)
    pipeline = said["_class_name"] or _PIPELINES[is_xl]
    if said["requires_aesthetics_score"]:
        raise UserError(
            f"a {pipeline} with requires_aesthetics_score=true, such as the refiner of Stable "
            "Diffusion XL, is not supported; give the base model"
        )
    for part, supported in _CLASSES.items():
        name = _class_name(config.get(part))
        if name not in (None, supported):
            raise UserError(f"{part} is of the class {name}; only {supported} is supported")
    if pipeline not in _PIPELINES:
        note(f"model_index.json is of a {pipeline}; its parts are used as a {_PIPELINES[is_xl]}'s")
    if _class_name(config.get("safety_checker")):
        note("the model's safety checker is not run")
    return is_xl and said["force_zeros_for_empty_prompt"]


def read_scheduler(config: Mapping[str, Any], is_xl: bool) -> DDIMScheduler:
    """Reads scheduler_config.json, of whatever class, as a pipeline that samples with DDIM does.

    StableDiffusionPipeline takes steps_offset for 1 and never clips latents, whatever the file
    says. StableDiffusionXLPipeline takes both as they are; a file of a class that does not clip by
    default is not read as if it did.

    Raises:
        UserError: see `DDIMScheduler.from_config`.
    """
    scheduler = DDIMScheduler.from_config(config)
    if is_xl:
        clips = config.get("_class_name", _CLIPPING[0]) in _CLIPPING
        scheduler = dataclasses.replace(
            scheduler, clip_sample=scheduler.clip_sample and (clips or "clip_sample" in config)
        )
        if scheduler.clip_sample:
            note(
                "the scheduler clips predicted latents, which have no such range: set clip_sample "
                "to false in scheduler_config.json unless the model was trained so"
            )
        return scheduler
    right = {"steps_offset": 1, "clip_sample": False}
    for key, value in right.items():
        if key in config and getattr(scheduler, key) != value:
            note(
                f"scheduler_config.json has {key}={getattr(scheduler, key)}, an outdated value; "
                f"{value} is used, as by diffusers' StableDiffusionPipeline"
            )
    return dataclasses.replace(scheduler, **right)


def read_unet(config: Mapping[str, Any], is_xl: bool) -> UNetConfig:
    """Reads the UNet's config.json, with the size of the images that it was trained on.

    Raises:
        UserError: see `UNetConfig.from_dict`; and for latents that are not square.
    """
    side = config.get("sample_size")
    if isinstance(side, list) and len(side) == 2:
        if side[0] != side[1]:
            raise UserError(
                f"sample_size={shorten(side)} is not supported: write one number there, and give "
                "the height and width of images"
            )
        side = side[0]
    if side is None:
        side = _SIDE_OF_XL if is_xl else _SIDE
        note(f"the UNet's config.json has no sample_size; {side} latents a side are the default")
    version = config.get("_diffusers_version")
    is_old = isinstance(version, str) and _OLD_VERSION.match(version)
    if not is_xl and is_old and type(side) is int and side < _SIDE:
        note(
            f"the UNet's config.json, of diffusers {version}, has sample_size={side}, an outdated "
            f"value; {_SIDE} is used, as by diffusers' StableDiffusionPipeline"
        )
        side = _SIDE
    return UNetConfig.from_dict({**config, "sample_size": side})


def read_vae(config: Mapping[str, Any]) -> VAEConfig:
    """Reads the autoencoder's config.json; UserError where not supported."""
    return VAEConfig.from_dict({"force_upcast": True, **config})


def read_text_encoder(config: Mapping[str, Any], is_xl: bool) -> CLIPTextConfig:
    """Reads a text encoder's config.json.

    Raises:
        UserError: see `CLIPTextConfig.from_dict`; and where padding is masked.
    """
    if config.get("use_attention_mask") and not is_xl:
        raise UserError("use_attention_mask=true, which masks padding, is not supported")
    return CLIPTextConfig.from_dict(config)


def _class_name(part: Any) -> str | None:
    """The class of a part that model_index.json names as [library, class]."""
    return part[1] if isinstance(part, list) and len(part) == 2 else None

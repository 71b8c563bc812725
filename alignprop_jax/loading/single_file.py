"""Whole models in one file, in the layout of the original latent diffusion code.

Stable Diffusion 1.x, 2.x and XL are published and passed on in this form. The file holds the
networks' tensors and nothing else, so that

- their architecture is read off the shapes;
- the UNet's tensors are those under `model.diffusion_model.`, which in a file called "emaonly" are
  the averaged ones; a second set under `model_ema.` is left alone;
- the noise schedule is the one that all of them were trained with. Stable Diffusion 2 predicts v at
  768 pixels, or noise at 512 where the file's name says "512"; the others predict noise. What the
  file's header (modelspec.prediction_type, modelspec.resolution) or marker tensors (v_pred, ztsnr)
  say comes first;
- the tokenizer is CLIP's, from the hub.

A folder beside the file with its name, without the suffix, comes before all of this: it may have
any part of a diffusers pipeline but the weights, such as scheduler/scheduler_config.json,
tokenizer/ or unet/config.json.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from alignprop_jax.errors import UserError
from alignprop_jax.loading import hub, ldm_names, open_clip_names, shapes_only
from alignprop_jax.loading.shape_configs import Shapes, text_config, unet_config, vae_config
from alignprop_jax.loading.sources import FolderSource, T, parse_config
from alignprop_jax.loading.tensor_files import read_metadata, read_shapes, read_tensors
from alignprop_jax.loading.tokenizer import load_tokenizer
from alignprop_jax.loading.weights import ParamTree, fill_params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

_CLIP_TOKENIZER = hub.HubName("openai/clip-vit-large-patch14")
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
# Stable Diffusion 2's UNet attends to the states before the last of ViT-H's 24 layers.
_LAYERS_OF_SD2 = 23
_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

Tensors = Iterable[tuple[str, np.ndarray]]


class _Part(NamedTuple):
    """Tensors under a prefix, and how to give them the names of diffusers or transformers."""

    prefix: str
    rename: Callable[[Tensors], Iterator[tuple[str, np.ndarray]]]


class SingleFileSource:
    """A `ModelSource`: components "unet", "vae", "text_encoder", of SDXL also "text_encoder_2"."""

    def __init__(self, path: Path):
        """Reads the names and shapes of the tensors.

        Raises:
            UserError: the file cannot be read or is no whole Stable Diffusion in this layout.
        """
        self._path = path
        self._beside = path.with_suffix("")
        shapes = read_shapes(path)
        metadata = read_metadata(path) if path.suffix == ".safetensors" else {}
        self._parts = _find_parts(path, shapes)
        try:
            self._configs = _configs(path, self._parts, shapes, metadata)
        except KeyError as error:
            raise UserError(f"{path}: no whole Stable Diffusion; it lacks {error}") from error

    def __str__(self) -> str:
        return str(self._path)

    def has(self, component: str) -> bool:
        return component in self._parts

    def config(self, component: str, parse: Callable[[Mapping[str, Any]], T]) -> T:
        if (self._beside / component).is_dir():
            return FolderSource(self._beside).config(component, parse)
        return parse_config(self._of(self._configs, component), parse, self._origin(component))

    def tensors(self, component: str) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of a component by diffusers' or transformers' names, one by one."""
        prefix, rename = self._of(self._parts, component)
        return rename(
            _named(lambda name: name.removeprefix(prefix), read_tensors(self._path, prefix))
        )

    def params(self, component: str, abstract: ParamTree, dtype: Any) -> ParamTree:
        if shapes_only.active():
            return shapes_only.shapes(abstract, dtype)
        return fill_params(abstract, self.tensors(component), self._origin(component), dtype)

    def tokenizer(self, component: str = "tokenizer") -> "PreTrainedTokenizerBase":
        if (self._beside / component).is_dir():
            return load_tokenizer(self._beside / component)
        try:
            folder = hub.download_tokenizer(_CLIP_TOKENIZER)
        except UserError as error:
            raise UserError(
                f"{self._path}: needs CLIP's tokenizer, which is not in the file. {error}. Or put "
                f"vocab.json and merges.txt into {self._beside / component}"
            ) from error
        encoder = component.replace("tokenizer", "text_encoder")
        # OpenCLIP fills up with id 0, which is this token.
        open_clip = self._of(self._parts, encoder).rename in (_rename_sd2, _rename_sdxl)
        return load_tokenizer(folder, pad_token="!" if open_clip else None)

    def _of(self, components: Mapping[str, T], component: str) -> T:
        if component not in components:
            raise UserError(f"{self._path}: no {component} in this file")
        return components[component]

    def _origin(self, component: str) -> str:
        return f"{self._path}: {component}"


def _find_parts(path: Path, shapes: Shapes) -> dict[str, _Part]:
    def names(prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]

    unet = ldm_names.unet_names(names(_UNET))
    vae = ldm_names.vae_names(names(_VAE))
    parts = {
        "unet": _Part(_UNET, functools.partial(_named, unet.__getitem__)),
        "vae": _Part(_VAE, functools.partial(ldm_names.rename_vae, names=vae)),
    }
    if names("conditioner.embedders.1."):
        parts["text_encoder"] = _Part("conditioner.embedders.0.transformer.", _rename_clip)
        parts["text_encoder_2"] = _Part("conditioner.embedders.1.model.", _rename_sdxl)
    elif names("cond_stage_model.model."):
        parts["text_encoder"] = _Part("cond_stage_model.model.", _rename_sd2)
    else:
        parts["text_encoder"] = _Part("cond_stage_model.transformer.", _rename_clip)
    for prefix, _ in parts.values():
        if not names(prefix):
            raise UserError(
                f"{path}: has no tensors {prefix}*, so it is no whole Stable Diffusion 1, 2 or XL "
                "in the original layout; of a diffusers pipeline give the folder"
            )
    return parts


def _named(new: Callable[[str], str], tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors under the names `new(name)`."""
    for pair in tensors:
        yield new(pair[0]), pair[1]
        # Not kept while the next one is read.
        del pair


def _rename_clip(tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    return _named(lambda name: f"text_model.{name.removeprefix('text_model.')}", tensors)


def _rename_sd2(tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """The part of OpenCLIP's text tower that Stable Diffusion 2 uses."""
    for name, tensor in open_clip_names.rename(tensors):
        layer = re.match(r"text_model\.encoder\.layers\.(\d+)\.", name)
        if name.startswith("text_model.") and not (layer and int(layer[1]) >= _LAYERS_OF_SD2):
            yield name, tensor


def _rename_sdxl(tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """OpenCLIP's text tower and projection, without the temperature."""
    for name, tensor in open_clip_names.rename(tensors):
        if name != "logit_scale":
            yield name, tensor


def _configs(
    path: Path, parts: Mapping[str, _Part], shapes: Shapes, metadata: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The configs by component; KeyError for a tensor that is missing."""

    def renamed(component: str) -> Shapes:
        prefix, rename = parts[component]
        # Views of one number: no memory stands behind them.
        stand_ins = (
            (name.removeprefix(prefix), np.broadcast_to(0, shape))
            for name, shape in shapes.items()
            if name.startswith(prefix)
        )
        return {name: tensor.shape for name, tensor in rename(stand_ins)}

    is_sdxl = "text_encoder_2" in parts
    is_sd2 = parts["text_encoder"].rename is _rename_sd2
    predicts_v = _predicts_v(metadata, shapes, default=is_sd2 and "512" not in path.name)
    configs = {
        "vae": vae_config(renamed("vae"), scaling_factor=0.13025 if is_sdxl else 0.18215),
        "text_encoder": text_config(renamed("text_encoder"), "gelu" if is_sd2 else "quick_gelu"),
        "scheduler": {
            **_SCHEDULER,
            "prediction_type": "v_prediction" if predicts_v else "epsilon",
            "rescale_betas_zero_snr": "ztsnr" in shapes,
            "timestep_spacing": "trailing" if "ztsnr" in shapes else "leading",
        },
    }
    pooled_dim = None
    if is_sdxl:
        configs["model_index"] = {"force_zeros_for_empty_prompt": True}
        configs["vae"]["force_upcast"] = True
        configs["text_encoder_2"] = text_config(renamed("text_encoder_2"), "gelu")
        pooled_dim = configs["text_encoder_2"]["projection_dim"]
    resolution = _resolution(metadata) or (
        1024 if is_sdxl else 768 if is_sd2 and predicts_v else 512
    )
    downscale = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    configs["unet"] = unet_config(renamed("unet"), resolution // downscale, pooled_dim)
    return configs


def _predicts_v(metadata: Mapping[str, str], shapes: Shapes, default: bool) -> bool:
    said = metadata.get("modelspec.prediction_type", "").lower()
    return said.startswith("v") if said else "v_pred" in shapes or default


def _resolution(metadata: Mapping[str, str]) -> int | None:
    """The pixels of a side, of "768x768" or "768"."""
    match = re.match(r"\d+", metadata.get("modelspec.resolution", ""))
    return int(match[0]) if match else None

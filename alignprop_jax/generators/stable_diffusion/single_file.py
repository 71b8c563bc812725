"""Whole models in one file, in the layout of the original latent diffusion code.

Stable Diffusion 1.x, 2.x and XL are published and passed on in this form. The file holds the
networks' tensors and little else, so that

- which of them it is, and its architecture, are read off names and shapes: XL has two text
  encoders, and Stable Diffusion 2 projects by linear layers where 1 has convolutions;
- the UNet's tensors are those under `model.diffusion_model.`, which in a file called "emaonly" are
  the averaged ones; a second set under `model_ema.` is left alone;
- the noise schedule is the one that all of them were trained with. What the UNet predicts is what
  the file says: its header (modelspec.prediction_type, modelspec.architecture), marker tensors
  (v_pred, ztsnr) or, of the first Stable Diffusion 2, its global_step. Where it says nothing a
  Stable Diffusion 2 is taken to predict v at 768 pixels, or noise at 512 where the file's name has
  the number 512; the others predict noise. A note says what was assumed;
- the tokenizer is CLIP's, from the hub.

A folder beside the file with its name, without the suffix, comes before all of this: it may have
any part of a diffusers pipeline but the weights, such as scheduler/scheduler_config.json,
tokenizer/ or unet/config.json. A scheduler without betas there has the model's.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from alignprop_jax.errors import UserError, note
from alignprop_jax.generators.stable_diffusion.shape_configs import (
    Shapes,
    text_config,
    unet_config,
    vae_config,
)
from alignprop_jax.inputs.foreign_json import shorten
from alignprop_jax.loading import hub, ldm_names, open_clip_names, shapes_only
from alignprop_jax.loading.sources import FolderSource, T, parse_config
from alignprop_jax.loading.tensor_files import read_metadata, read_shapes, read_tensors
from alignprop_jax.loading.tokenizer import load_tokenizer
from alignprop_jax.loading.torch_file import read_pickle_step
from alignprop_jax.loading.weights import ParamTree, fill_params
from alignprop_jax.nn.clip import CLIPTextConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_CLIP_TOKENIZER = hub.HubName("openai/clip-vit-large-patch14")
_UNET = "model.diffusion_model."
_VAES = ("first_stage_model.", "vae.")
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

# The last step of Stable Diffusion 2 base, which predicts noise, as diffusers knows it by.
_STEPS_OF_SD2_BASE = 875000
_EDM_MARKERS = ("edm_mean", "edm_vpred.sigma_max")
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_PREDICTION_OF_ARCHITECTURE = {
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
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
        self._family = _family(path, shapes)
        try:
            self._parts = _find_parts(path, self._family, shapes)
            self._configs = self._make_configs(shapes)
        except KeyError as error:
            raise UserError(f"{path}: no whole Stable Diffusion; it lacks {error}") from error
        except (IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: no Stable Diffusion; its tensors have other names or shapes ({error})"
            ) from error

    def __str__(self) -> str:
        return str(self._path)

    def has(self, component: str) -> bool:
        return component in self._parts or component in self._configs

    def config(self, component: str, parse: Callable[[Mapping[str, Any]], T]) -> T:
        if component != "scheduler" and (self._beside / component).is_dir():
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
        encoder = self.config(
            component.replace("tokenizer", "text_encoder"), CLIPTextConfig.from_dict
        )
        if (self._beside / component).is_dir():
            return load_tokenizer(self._beside / component, encoder)
        try:
            folder = hub.download_tokenizer(_CLIP_TOKENIZER)
        except UserError as error:
            raise UserError(
                f"{self._path}: needs CLIP's tokenizer, which is not in the file. {error}. Or put "
                f"vocab.json and merges.txt into {self._beside / component}"
            ) from error
        # OpenCLIP fills up with id 0, which is this token.
        open_clip = self._family == "2" or component == "tokenizer_2"
        return load_tokenizer(folder, encoder, "!" if open_clip else None)

    def _of(self, components: Mapping[str, T], component: str) -> T:
        if component not in components:
            raise UserError(f"{self._path}: no {component} in this file")
        return components[component]

    def _origin(self, component: str) -> str:
        if component == "scheduler" and (self._beside / component).is_dir():
            return f"{self._beside / component / 'scheduler_config.json'}"
        return f"{self._path}: {component}"

    def _make_configs(self, shapes: Shapes) -> dict[str, dict[str, Any]]:
        """The configs by component; KeyError for a tensor that is missing."""

        def renamed(component: str) -> Shapes:
            prefix, rename = self._parts[component]
            # Views of one number: no memory stands behind them.
            stand_ins = (
                (name.removeprefix(prefix), np.broadcast_to(0, shape))
                for name, shape in shapes.items()
                if name.startswith(prefix)
            )
            return {name: tensor.shape for name, tensor in rename(stand_ins)}

        is_xl = self._family == "XL"
        activation = "gelu" if self._family == "2" else "quick_gelu"
        configs = {
            "vae": vae_config(renamed("vae"), scaling_factor=0.13025 if is_xl else 0.18215),
            "text_encoder": text_config(renamed("text_encoder"), activation),
        }
        pooled_dim = None
        if is_xl:
            configs["model_index"] = {"force_zeros_for_empty_prompt": True}
            configs["vae"]["force_upcast"] = True
            configs["text_encoder_2"] = text_config(renamed("text_encoder_2"), "gelu")
            pooled_dim = configs["text_encoder_2"]["projection_dim"]
        configs["scheduler"], resolution = self._sampling(shapes)
        downscale = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        configs["unet"] = unet_config(renamed("unet"), resolution // downscale, pooled_dim)
        return configs

    def _sampling(self, shapes: Shapes) -> tuple[dict[str, Any], int]:
        """The scheduler's config and the pixels of a side, saying what of them is assumed."""
        metadata = read_metadata(self._path) if self._path.suffix == ".safetensors" else {}
        beside = {}
        if (self._beside / "scheduler").is_dir():
            beside = FolderSource(self._beside).config("scheduler", dict)
        assumed = []
        prediction = beside.get("prediction_type") or self._said_prediction(shapes, metadata)
        if prediction is None:
            by_name = self._family == "2" and re.search(r"(?<!\d)512(?!\d)", self._path.name)
            predicts_noise = self._family != "2" or by_name
            prediction = "epsilon" if predicts_noise else "v_prediction"
            assumed.append("noise is predicted" if predicts_noise else "v is predicted")
            if by_name:
                assumed[-1] += " (by the 512 in its name)"
        resolution = _said_resolution(metadata)
        if resolution is None:
            is_v_of_sd2 = self._family == "2" and prediction == "v_prediction"
            resolution = 1024 if self._family == "XL" else 768 if is_v_of_sd2 else 512
            if not (self._beside / "unet").is_dir():
                assumed.append(f"images have {resolution} pixels a side")
        if assumed:
            other = "epsilon" if prediction == "v_prediction" else "v_prediction"
            note(
                f"{self._path} is a Stable Diffusion {self._family} by its tensors; what it does "
                f"not say is assumed: {', '.join(assumed)}. To say otherwise write "
                f'{{"prediction_type": "{other}"}} into '
                f"{self._beside / 'scheduler' / 'scheduler_config.json'}, and give height and width"
            )
        own = {
            **_SCHEDULER,
            "prediction_type": prediction,
            "rescale_betas_zero_snr": "ztsnr" in shapes,
            "timestep_spacing": "trailing" if "ztsnr" in shapes else "leading",
        }
        has_betas = "beta_start" in beside or "trained_betas" in beside
        return (beside if has_betas else {**own, **beside}), resolution

    def _said_prediction(self, shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
        """What the file says that its UNet predicts; UserError for what is not supported."""
        said = metadata.get("modelspec.prediction_type")
        if said is not None:
            if said.lower() not in _PREDICTIONS:
                raise UserError(
                    f"{self._path}: modelspec.prediction_type={shorten(said)} is not supported; it "
                    f"must be {' or '.join(_PREDICTIONS)}"
                )
            return _PREDICTIONS[said.lower()]
        if "v_pred" in shapes:
            return "v_prediction"
        if self._family == "2" and _has_step_of_sd2_base(self._path):
            return "epsilon"
        architecture = metadata.get("modelspec.architecture", "").lower()
        return _PREDICTION_OF_ARCHITECTURE.get(architecture)


def _family(path: Path, shapes: Shapes) -> str:
    """Which Stable Diffusion it is: "1", "2" or "XL"."""
    for marker in _EDM_MARKERS:
        if marker in shapes:
            raise UserError(
                f"{path}: has {marker}, so its noise is that of EDM (Playground 2.5, CosXL), which "
                "is not supported"
            )
    if any(name.startswith("conditioner.embedders.1.") for name in shapes):
        return "XL"
    if any(name.startswith("conditioner.embedders.0.model.") for name in shapes):
        raise UserError(
            f"{path}: the refiner of Stable Diffusion XL is not supported; give the base model"
        )
    projection = shapes.get(f"{_UNET}middle_block.1.proj_in.weight", ())
    return "2" if len(projection) == 2 else "1"


def _find_parts(path: Path, family: str, shapes: Shapes) -> dict[str, _Part]:
    def names(prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]

    def text_tower(embedder: str, projects: bool = False) -> _Part:
        open_clip = bool(names(f"{embedder}.model."))
        layers = _LAYERS_OF_SD2 if family == "2" else None
        rename = functools.partial(
            _rename_text, open_clip=open_clip, layers=layers, projects=projects
        )
        return _Part(f"{embedder}.{'model' if open_clip else 'transformer'}.", rename)

    unet = ldm_names.unet_names(names(_UNET))
    vae_prefix = next((prefix for prefix in _VAES if names(prefix)), _VAES[0])
    vae = ldm_names.vae_names(names(vae_prefix))
    parts = {
        "unet": _Part(_UNET, functools.partial(_named, unet.__getitem__)),
        "vae": _Part(vae_prefix, functools.partial(ldm_names.rename_vae, names=vae)),
    }
    if family == "XL":
        parts["text_encoder"] = text_tower("conditioner.embedders.0")
        parts["text_encoder_2"] = text_tower("conditioner.embedders.1", projects=True)
    else:
        parts["text_encoder"] = text_tower("cond_stage_model")
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


def _rename_text(
    tensors: Tensors, open_clip: bool, layers: int | None, projects: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """What is used of a text tower in OpenCLIP's or transformers' names, in transformers'.

    Args:
        layers: how many are used, of Stable Diffusion 2's; None for all.
        projects: whether the projection is used.
    """
    if open_clip:
        # Without the temperature and, where there is one, the tower for images.
        used = ("text_model.", "text_projection")
        tensors = (pair for pair in open_clip_names.rename(tensors) if pair[0].startswith(used))
    for name, tensor in tensors:
        name = name.removeprefix("text_model.")
        layer = re.match(r"encoder\.layers\.(\d+)\.", name)
        if name.startswith("text_projection"):
            if projects:
                yield name, tensor
        elif name != "logit_scale" and not (layers and layer and int(layer[1]) >= layers):
            yield f"text_model.{name}", tensor


def _said_resolution(metadata: Mapping[str, str]) -> int | None:
    """The pixels of a side, of "768x768" or "768"; None where that is not said."""
    match = re.fullmatch(r"(\d{2,5})(\s*x\s*\1)?", metadata.get("modelspec.resolution", ""))
    return int(match[1]) if match else None


def _has_step_of_sd2_base(path: Path) -> bool:
    if path.suffix == ".safetensors":
        steps = dict(read_tensors(path, "global_step"))
        step = steps.get("global_step")
    else:
        step = read_pickle_step(path)
    return np.size(step) == 1 and bool(np.all(np.asarray(step) == _STEPS_OF_SD2_BASE))

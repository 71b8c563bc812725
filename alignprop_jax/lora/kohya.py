"""Low-rank factors as kohya's trainers write them and ComfyUI and A1111's web UI read them.

A layer is three tensors, lora_down [r, in], lora_up [out, r] and the scalar alpha, under the name
of the layer with underscores for dots: diffusers' name for Stable Diffusion 1.x and 2.x, and for XL
that of the original code, whose blocks count through all resolutions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from alignprop_jax.errors import UserError
from alignprop_jax.loading.ldm_names import original_unet_layers
from alignprop_jax.loading.tensor_files import write_safetensors
from alignprop_jax.lora.factors import LoraTree, linear_shapes

KOHYA_FILE = "comfyui_lora.safetensors"
PREFIX = "lora_unet_"

_FACTORS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
# What kohya's trainers and the model metadata standard (modelspec) call a base model, by whether it
# is an XL, the width of its context and what it predicts.
_BASE_MODELS = {
    (False, 768, "epsilon"): ("sd_v1", "stable-diffusion-v1"),
    (False, 768, "v_prediction"): ("sd_v1_v", "stable-diffusion-v1"),
    (False, 1024, "epsilon"): ("sd_v2", "stable-diffusion-v2-512"),
    (False, 1024, "v_prediction"): ("sd_v2_v", "stable-diffusion-v2-768-v"),
    (True, 2048, "epsilon"): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    (True, 2048, "v_prediction"): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def save_kohya_lora(
    path: str | Path,
    lora: LoraTree,
    alpha: float,
    unet_params: Mapping[str, Any],
    prediction_type: str,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a UNet's factors as ComfyUI and A1111's web UI read them.

    Args:
        path: the file. Its folder is made.
        lora: the trained tree, of one rank, without its scale.
        alpha: the layers' change is (alpha / rank) down up.
        unet_params: the parameters of the adapted UNet, or anything of their shapes.
        prediction_type: what that UNet predicts, in the words of diffusers' schedulers.
        metadata: what to record in the header, beside what the readers look for there.

    Raises:
        UserError: the file cannot be written.
    """
    layers = linear_shapes(unet_params)
    original = original_unet_layers(layers) if _is_xl(unet_params) else {}
    factors = flatten_dict(lora)
    (rank,) = {leaf.shape[-1] for path, leaf in factors.items() if path[-1] == "down"}
    tensors = {}
    for keys, leaf in factors.items():
        layer = ".".join(keys[:-1])
        name = PREFIX + original.get(layer, layer).replace(".", "_")
        tensors[f"{name}.lora_{keys[-1]}.weight"] = np.asarray(leaf, np.float32).T
        tensors[f"{name}.alpha"] = np.float32(alpha)
    header = {
        **(metadata or {}),
        **_base_model(unet_params, prediction_type, title=Path(path).stem),
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
    }
    write_safetensors(tensors, path, {name: str(value) for name, value in header.items()})


def kohya_layers(unet_params: Mapping[str, Any]) -> dict[str, str]:
    """The dotted name of every linear layer, by each of the names kohya's files may have for it."""
    original = original_unet_layers(linear_shapes(unet_params))
    return {
        name.replace(".", "_"): layer
        for layer, other in original.items()
        for name in (layer, other)
    }


def parse_kohya_key(file: Path, name: str, layers: Mapping[str, str]) -> tuple[str, str]:
    """The layer, and "down", "up" or "alpha".

    Args:
        file: for messages.
        name: of a tensor, beginning with `PREFIX`.
        layers: of the model, from `kohya_layers`.

    Raises:
        UserError: it is no such tensor, or for a layer that the model has not.
    """
    stem, _, kind = name.removeprefix(PREFIX).partition(".")
    if kind not in _FACTORS:
        raise UserError(
            f"{file}: {name} is no tensor of a plain LoRA (lora_down, lora_up, alpha); other "
            "kinds, such as LoHa, are not supported"
        )
    if stem not in layers:
        raise UserError(
            f"{file}: {name} is for a layer that is no linear one of this model; the LoRA was made "
            "for another model, or adapts convolutions, which is not supported"
        )
    return layers[stem], _FACTORS[kind]


def _is_xl(unet_params: Mapping[str, Any]) -> bool:
    return "add_embedding" in unet_params


def _base_model(unet_params: Mapping[str, Any], prediction_type: str, title: str) -> dict[str, str]:
    """The header's entries on the base model; none for one of another size than the published."""
    shapes = linear_shapes(unet_params)
    width = next(fan_in for name, (_, fan_in, _) in shapes.items() if name.endswith("attn2.to_k"))
    is_xl = _is_xl(unet_params)
    known = _BASE_MODELS.get((is_xl, width, prediction_type))
    if known is None:
        return {}
    version, architecture = known
    return {
        "ss_base_model_version": version,
        # A1111's web UI takes what is neither XL nor this for Stable Diffusion 1.
        "ss_v2": str(version.startswith("sd_v2")),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": (
            "https://github.com/Stability-AI/generative-models" if is_xl else "diffusers"
        ),
        "modelspec.title": title,
        "modelspec.prediction_type": _PREDICTIONS[prediction_type],
    }

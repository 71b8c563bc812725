"""Low-rank factors as kohya's trainers write them and ComfyUI and A1111's web UI read them.

A layer is three tensors, lora_down [r, in], lora_up [out, r] and the scalar alpha, under the name
of the layer with underscores for dots: diffusers' name for Stable Diffusion 1.x and 2.x, and for XL
that of the original code, whose blocks count through all resolutions. A convolution's are
[r, in, height, width] and [out, r, 1, 1]. Layers of text encoders have transformers' names.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from alignprop_jax.loading.ldm_names import original_unet_layers
from alignprop_jax.loading.tensor_files import write_safetensors
from alignprop_jax.loading.weights import to_torch_layout
from alignprop_jax.lora.factors import LoraTree, layer_shapes, linear_shapes, rank_of

KOHYA_FILE = "comfyui_lora.safetensors"
# What names begin with, by part of the model: of two text encoders, the first is te1.
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_PREFIXES_OF_XL = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_PREFIXES_OF_OTHERS = {"unet": "lora_unet_", "text_encoder": "lora_te_"}

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
    text: LoraTree | None = None,
) -> None:
    """Writes a UNet's factors as ComfyUI and A1111's web UI read them.

    Args:
        path: the file. Its folder is made.
        lora: the trained tree, of one rank, without its scale.
        alpha: the layers' change is (alpha / rank) down up.
        unet_params: the parameters of the adapted UNet, or anything of their shapes.
        prediction_type: what that UNet predicts, in the words of diffusers' schedulers.
        metadata: what to record in the header, beside what the readers look for there.
        text: factors of text encoders by their names, with their scale folded in, as `load_lora`
            gives them.

    Raises:
        UserError: the file cannot be written.
    """
    is_xl = _is_xl(unet_params)
    original = original_unet_layers(layer_shapes(unet_params)) if is_xl else {}
    prefixes = _PREFIXES_OF_XL if is_xl else _PREFIXES_OF_OTHERS
    tensors = {}
    for part, tree in {"unet": lora, **(text or {})}.items():
        for keys, leaf in flatten_dict(tree).items():
            layer = ".".join(keys[:-1])
            layer = original.get(layer, layer) if part == "unet" else layer
            name = prefixes[part] + layer.replace(".", "_")
            tensors[f"{name}.lora_{keys[-1]}.weight"] = to_torch_layout(
                ("kernel",), np.asarray(leaf, np.float32)
            )
            if keys[-1] == "down":
                of_layer = alpha if part == "unet" else leaf.shape[-1]
                tensors[f"{name}.alpha"] = np.float32(of_layer)
    header = {
        **(metadata or {}),
        **_base_model(unet_params, prediction_type, title=Path(path).stem),
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank_of(lora),
        "ss_network_alpha": alpha,
    }
    write_safetensors(tensors, path, {name: str(value) for name, value in header.items()})


def kohya_layers(layers: Mapping[str, Iterable[str]]) -> dict[str, dict[str, str]]:
    """By part, the dotted name of every layer by each of the names kohya's files may have for it.

    Args:
        layers: by part, all dotted names.
    """
    names = {part: {name.replace(".", "_"): name for name in of} for part, of in layers.items()}
    original = original_unet_layers(layers.get("unet", ()))
    others = {other.replace(".", "_"): name for name, other in original.items()}
    names["unet"] = others | names.get("unet", {})
    return names


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

"""Low-rank factors as the file of diffusers and PEFT, `pytorch_lora_weights.safetensors`.

Files of kohya's trainers are read, too; see `kohya`.

A layer is two tensors, lora_A [r, in] and lora_B [out, r], the transposes of `down` and `up`. What
multiplies their product differs between releases and tools: some read alpha from the header, some
take it to be r. Written files hold (alpha / r) up as lora_B and name r as alpha, so that every
reader applies the same change.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from alignprop_jax.errors import UserError
from alignprop_jax.loading.tensor_files import read_metadata, read_safetensors, write_safetensors
from alignprop_jax.lora.factors import LoraTree, linear_shapes, scale_lora
from alignprop_jax.lora.kohya import PREFIX, kohya_layers, parse_kohya_key

LORA_FILE = "pytorch_lora_weights.safetensors"

# Where diffusers (0.35 and later) keeps the arguments of PEFT's LoraConfig, as JSON.
_ADAPTER_KEY = "lora_adapter_metadata"
_UNET = "unet."
_PREFIXES = (_UNET, "base_model.model.", "")
_KEY = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<peft>[AB])|lora\.(?P<diffusers>down|up))\.weight")
_FACTORS = {"A": "down", "B": "up", "down": "down", "up": "up"}


def save_lora(
    path: str | Path, lora: LoraTree, alpha: float, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a UNet's factors as diffusers' `load_lora_weights` and PEFT read them.

    Args:
        path: the file, by convention `pytorch_lora_weights.safetensors`. Its folder is made.
        lora: the trained tree, of one rank, without its scale.
        alpha: the layers' change is (alpha / rank) down up.
        metadata: what to record in the header beside rank and alpha, such as base model and reward.

    Raises:
        UserError: the file cannot be written.
    """
    factors = flatten_dict(lora)
    (rank,) = {leaf.shape[-1] for path, leaf in factors.items() if path[-1] == "down"}
    tensors = {}
    for keys, leaf in flatten_dict(scale_lora(lora, alpha / rank)).items():
        name = "lora_A" if keys[-1] == "down" else "lora_B"
        tensors[_UNET + ".".join([*keys[:-1], name, "weight"])] = np.asarray(leaf, np.float32).T
    adapter = {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({".".join(keys[:-1]) for keys in factors}),
    }
    header = {
        **(metadata or {}),
        "rank": rank,
        "alpha": alpha,
        _ADAPTER_KEY: json.dumps({_UNET + name: value for name, value in adapter.items()}),
    }
    write_safetensors(tensors, path, {name: str(value) for name, value in header.items()})


def load_lora(path: str | Path, unet_params: Mapping[str, Any]) -> tuple[LoraTree, dict[str, str]]:
    """Reads a UNet's factors as written here, by diffusers, by PEFT or by kohya's trainers.

    Args:
        path: a safetensors file, or the folder that `save_lora_weights` or PEFT's `save_pretrained`
            made.
        unet_params: the parameters of the UNet to adapt, or anything of their shapes.

    Returns:
        The factors in float32, ready for the model: each layer's scale, which may come from the
        header, from PEFT's adapter_config.json, from an alpha beside the factors or from the rank
        alone, is folded into `up`. And the header's other entries.

    Raises:
        UserError: the file is absent, damaged or of a kind that is not supported, or it was made
            for another model. The message names the tensor.
    """
    file = _find_file(Path(path))
    metadata = read_metadata(file)
    adapter = _read_adapter(file, metadata.pop(_ADAPTER_KEY, None))
    metadata.pop("format", None)
    linears, kohya_names = linear_shapes(unet_params), kohya_layers(unet_params)
    factors, alphas = {}, {}
    for name, tensor in read_safetensors(file):
        if name.startswith(PREFIX):
            layer, factor = parse_kohya_key(file, name, kohya_names)
        else:
            layer, factor = _parse_key(file, name)
        if factor == "alpha":
            if tensor.size != 1:
                raise UserError(f"{file}: {name} has shape {list(tensor.shape)}; it is one number")
            alphas[layer] = float(tensor.item())
            continue
        if layer not in linears:
            raise UserError(
                f"{file}: {name} is for a layer that this model does not have; "
                "the LoRA was made for another model"
            )
        keys, fan_in, fan_out = linears[layer]
        size, axis = (fan_in, 1) if factor == "down" else (fan_out, 0)
        if tensor.ndim != 2 or tensor.shape[axis] != size:
            wanted = ["rank", size] if axis else [size, "rank"]
            raise UserError(
                f"{file}: {name} has shape {list(tensor.shape)}, this model needs "
                f"[{wanted[0]}, {wanted[1]}]; the LoRA was made for another model"
            )
        factors[*keys, factor] = jnp.asarray(tensor.T, jnp.float32)
    if not factors:
        raise UserError(f"{file}: no LoRA tensors in it")
    _check_pairs(file, factors)
    for keys in [keys for keys in factors if keys[-1] == "up"]:
        layer, rank = ".".join(keys[:-1]), factors[keys].shape[0]
        if layer in alphas:
            factors[keys] *= alphas[layer] / rank
        else:
            factors[keys] *= _scale(file, adapter, layer, rank)
    return unflatten_dict(factors), metadata


def continue_lora(
    path: str | Path, fresh: LoraTree, unet_params: Mapping[str, Any], scale: float
) -> LoraTree:
    """Reads factors to go on training, in the place of fresh ones.

    Args:
        path: as for `load_lora`.
        fresh: factors of the layers and of the rank that are to be trained.
        unet_params: the parameters of the UNet to adapt, or anything of their shapes.
        scale: alpha / rank, with which training multiplies them.

    Raises:
        UserError: as `load_lora`, or the file has other layers or another rank.
    """
    loaded, _ = load_lora(path, unet_params)
    found, wanted = flatten_dict(loaded), flatten_dict(fresh)
    other = sorted(".".join(keys[:-1]) for keys in found.keys() ^ wanted.keys())
    if other:
        here = "lacks" if any(".".join(keys[:-1]) == other[0] for keys in wanted) else "adapts"
        raise UserError(
            f"lora.init={path} {here} {other[0]}; "
            "config.lora.targets must name the layers it adapts"
        )
    ranks, (rank,) = (
        {leaf.shape[1] for keys, leaf in tree.items() if keys[-1] == "down"}
        for tree in (found, wanted)
    )
    if ranks != {rank}:
        raise UserError(
            f"lora.init={path} is of rank {', '.join(map(str, sorted(ranks)))}; "
            f"config.lora.rank={rank} must be the same"
        )
    return scale_lora(loaded, 1 / scale)


def _find_file(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise UserError(f"{path}: a pickle; convert the LoRA to safetensors")
        return path
    for name in (LORA_FILE, "adapter_model.safetensors"):
        if (path / name).exists():
            return path / name
    raise UserError(f"{path}: no LoRA in this folder; a file {LORA_FILE} is needed")


def _parse_key(file: Path, name: str) -> tuple[str, str]:
    if name.startswith(("text_encoder", "lora_te")):
        raise UserError(
            f"{file}: {name} adapts the text encoder; a LoRA of the UNet alone is needed"
        )
    match = _KEY.fullmatch(name)
    if match is None:
        raise UserError(
            f"{file}: {name} is no tensor of a LoRA as diffusers or PEFT writes it "
            "(LAYER.lora_A.weight and LAYER.lora_B.weight)"
        )
    prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
    return match["layer"].removeprefix(prefix), _FACTORS[match["peft"] or match["diffusers"]]


def _read_adapter(file: Path, header: str | None) -> dict[str, Any]:
    """The arguments of PEFT's LoraConfig that came with the tensors; empty without any."""
    source = file.with_name("adapter_config.json")
    if header is None and file.name == "adapter_model.safetensors" and source.exists():
        header = source.read_text(encoding="utf-8")
    if header is None:
        return {}
    try:
        return {key.removeprefix(_UNET): value for key, value in json.loads(header).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: its adapter configuration is not JSON ({error})") from error


def _check_pairs(file: Path, factors: Mapping[tuple[str, ...], Any]) -> None:
    for *layer, factor in factors:
        down, up = factors.get((*layer, "down")), factors.get((*layer, "up"))
        if down is None or up is None:
            other, name = ("lora_B", "lora_A") if factor == "down" else ("lora_A", "lora_B")
            raise UserError(f"{file}: layer {'.'.join(layer)} has {name} and lacks {other}")
        if down.shape[1] != up.shape[0]:
            raise UserError(
                f"{file}: layer {'.'.join(layer)} has a lora_A of rank {down.shape[1]} "
                f"and a lora_B of rank {up.shape[0]}"
            )


def _scale(file: Path, adapter: Mapping[str, Any], layer: str, rank: int) -> float:
    """What multiplies lora_B lora_A, by PEFT's rules; 1 without an adapter configuration."""
    if not adapter:
        return 1.0
    alpha = adapter.get("lora_alpha")
    for pattern, value in (adapter.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
            break
    if not isinstance(alpha, int | float):
        raise UserError(f"{file}: its adapter configuration has lora_alpha={alpha!r}, not a number")
    # Rank-stabilized LoRA divides by the root (Kalajdzievski, 2023, arXiv 2312.03732).
    return alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)

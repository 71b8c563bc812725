"""Low-rank factors as the file of diffusers and PEFT, `pytorch_lora_weights.safetensors`.

Files of kohya's trainers are read, too; see `names` for all that are.

A layer is two tensors, lora_A [r, in] and lora_B [out, r], the transposes of `down` and `up`; those
of a convolution are [r, in, height, width] and [out, r, 1, 1]. What multiplies their product
differs between releases and tools: some read alpha from the header, some take it to be r. Written
files hold (alpha / r) up as lora_B and name r as alpha, so that every reader applies the same
change.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from alignprop_jax.errors import UserError, note
from alignprop_jax.loading.tensor_files import read_metadata, read_safetensors, write_safetensors
from alignprop_jax.loading.weights import from_torch_layout, to_torch_layout
from alignprop_jax.lora.adapter_config import HEADER_KEY, AdapterConfigs, lora_config, to_header
from alignprop_jax.lora.factors import LoraTree, rank_of, scale_lora
from alignprop_jax.lora.names import UNET, Names, Place

LORA_FILE = "pytorch_lora_weights.safetensors"

_PEFT_NAMES = {"down": "lora_A", "up": "lora_B"}
# More than any layer of a model has inputs.
_HIGHEST_RANK = 16384


def save_lora(
    path: str | Path,
    lora: LoraTree,
    alpha: float,
    metadata: Mapping[str, Any] | None = None,
    text: LoraTree | None = None,
) -> None:
    """Writes a UNet's factors as diffusers' `load_lora_weights` and PEFT read them.

    Args:
        path: the file, by convention `pytorch_lora_weights.safetensors`. Its folder is made.
        lora: the trained tree, of one rank, without its scale.
        alpha: the layers' change is (alpha / rank) down up.
        metadata: what to record in the header beside rank and alpha, such as base model and reward.
        text: factors of text encoders by their names, with their scale folded in, as `load_lora`
            gives them.

    Raises:
        UserError: the file cannot be written.
    """
    rank = rank_of(lora)
    parts = {UNET: scale_lora(lora, alpha / rank), **(text or {})}
    save_parts(path, parts, {**(metadata or {}), "rank": rank, "alpha": alpha})


def save_parts(
    path: str | Path, parts: LoraTree, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes factors by part of the model, with their scale folded in; as `save_lora` otherwise."""
    tensors, configs = {}, {}
    for part, tree in parts.items():
        ranks = {}
        for keys, leaf in flatten_dict(tree).items():
            layer = ".".join(keys[:-1])
            array = to_torch_layout(("kernel",), np.asarray(leaf, np.float32))
            tensors[f"{part}.{layer}.{_PEFT_NAMES[keys[-1]]}.weight"] = array
            if keys[-1] == "down":
                # PEFT takes the end of a name for the layer, and transformers 5 has no prefix.
                ranks[layer.removeprefix("text_model.")] = leaf.shape[-1]
        configs[part] = lora_config(ranks)
    header = {**(metadata or {}), HEADER_KEY: to_header(configs)}
    write_safetensors(tensors, path, {name: str(value) for name, value in header.items()})


def load_lora(path: str | Path, params: Mapping[str, Any]) -> tuple[LoraTree, dict[str, str]]:
    """Reads factors as written here, by diffusers, by PEFT or by kohya's trainers.

    Args:
        path: a safetensors file, or the folder that `save_lora_weights` or PEFT's `save_pretrained`
            made.
        params: by its name, "unet", "text_encoder" or "text_encoder_2", the parameters of each part
            of the model, or anything of their shapes.

    Returns:
        By part, the factors in float32, ready for the model: each layer's scale, which may come
        from the header, from PEFT's adapter_config.json, from an alpha beside the factors or from
        the rank alone, is folded into `up`. The UNet is always there, with no factors if the file
        has none for it. And the header's other entries.

    Raises:
        UserError: the file is absent, damaged or of a kind that is not supported, or it was made
            for another model, or a number in it is not finite. The message names the tensor.
    """
    file = _find_file(Path(path))
    metadata = read_metadata(file)
    header = metadata.pop(HEADER_KEY, None)
    metadata.pop("format", None)
    tensors = list(read_safetensors(file))
    try:
        factors = _read_factors(tensors, Names(params), AdapterConfigs(file, header))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    tree = {UNET: {}, **unflatten_dict(factors)}
    text = " and ".join(part for part in tree if part != UNET)
    if text:
        note(
            f"{file} adapts {text}, too; this part applies as it is wherever prompts are encoded, "
            "whatever the timestep, and is not trained"
        )
    return tree, metadata


def continue_lora(
    path: str | Path, fresh: LoraTree, params: Mapping[str, Any], scale: float
) -> LoraTree:
    """Reads a UNet's factors to go on training, in the place of fresh ones.

    Args:
        path: as for `load_lora`.
        fresh: factors of the layers and of the rank that are to be trained.
        params: as for `load_lora`.
        scale: alpha / rank, with which training multiplies them.

    Raises:
        UserError: as `load_lora`, or the file has other layers or another rank.
    """
    loaded = load_lora(path, params)[0][UNET]
    found, wanted = flatten_dict(loaded), flatten_dict(fresh)
    other = sorted(".".join(keys[:-1]) for keys in found.keys() ^ wanted.keys())
    if other:
        here = "lacks" if any(".".join(keys[:-1]) == other[0] for keys in wanted) else "adapts"
        raise UserError(
            f"lora.init={path} {here} {other[0]}; "
            "config.lora.targets must name the layers it adapts"
        )
    rank = rank_of(fresh)
    ranks = {leaf.shape[-1] for keys, leaf in found.items() if keys[-1] == "down"}
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


def _read_factors(
    tensors: Iterable[tuple[str, np.ndarray]], names: Names, configs: AdapterConfigs
) -> dict[tuple[str, ...], Any]:
    """The factors by their paths, of which the first name is the part; scales are folded in."""
    found: dict[Place, tuple[str, np.ndarray]] = {}
    for name, tensor in tensors:
        place = names.find(name)
        if place in found:
            raise UserError(f"{name} and {found[place][0]} are for the same layer; one is needed")
        _check_numbers(name, tensor)
        found[place] = name, tensor
    if all(place.factor == "alpha" for place in found):
        raise UserError("no LoRA tensors in it")
    factors = {}
    for part, layer in dict.fromkeys((place.part, place.layer) for place in found):
        keys, kernel_shape = names.layers[part][layer]
        pair = [found.get(Place(part, layer, factor)) for factor in ("down", "up")]
        down, up = _read_pair(layer, pair, kernel_shape)
        rank = down.shape[-1]
        name, alpha = found.get(Place(part, layer, "alpha"), (layer, None))
        if alpha is None:
            scale = configs.scale(part, layer, rank)
        else:
            scale = float(_one_number(name, alpha)) / rank
        with np.errstate(over="ignore", invalid="ignore"):
            up *= np.float32(scale)
        if not np.isfinite(up).all():
            raise UserError(f"{name}: alpha / rank = {scale:g} makes its factors infinite")
        factors[part, *keys, "down"] = jnp.asarray(down)
        factors[part, *keys, "up"] = jnp.asarray(up)
    return factors


def _read_pair(
    layer: str, pair: list[tuple[str, np.ndarray] | None], kernel_shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """`down` and `up` of a layer, float32."""
    *spatial, fan_in, fan_out = kernel_shape
    wanted = (("rank", fan_in, *spatial), (fan_out, "rank", *(1 for _ in spatial)))
    for (name, tensor), shape in ((x, y) for x, y in zip(pair, wanted, strict=True) if x):
        sizes = zip(tensor.shape, shape, strict=False)
        if tensor.ndim != len(shape) or any(size not in (found, "rank") for found, size in sizes):
            raise UserError(
                f"{name} has shape {list(tensor.shape)}, this model needs "
                f"[{', '.join(map(str, shape))}]; the LoRA was made for another model"
            )
    if None in pair:
        has, lacks = ("lora_A", "lora_B") if pair[0] else ("lora_B", "lora_A")
        raise UserError(f"layer {layer} has {has if any(pair) else 'alpha'} and lacks {lacks}")
    (_, down), (_, up) = pair
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise UserError(
            f"layer {layer} has a lora_A of rank {rank} and a lora_B of rank {up.shape[1]}"
        )
    if not 1 <= rank <= _HIGHEST_RANK:
        raise UserError(f"layer {layer} is of rank {rank}; 1 to {_HIGHEST_RANK} are supported")
    ours = (
        np.empty((*spatial, fan_in, rank), np.float32),
        np.empty((*(1 for _ in spatial), rank, fan_out), np.float32),
    )
    for tensor, out in zip((down, up), ours, strict=True):
        from_torch_layout(("kernel",), tensor, out)
    return ours


def _check_numbers(name: str, tensor: np.ndarray) -> None:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(f"{name} is of type {tensor.dtype}; factors are floating-point numbers")
    if not np.isfinite(tensor.astype(np.float32)).all():
        raise UserError(f"{name} has numbers that are NaN or infinite; the file is damaged")


def _one_number(name: str, tensor: np.ndarray) -> Any:
    if tensor.size != 1:
        raise UserError(f"{name} has shape {list(tensor.shape)}; it is one number")
    return tensor.item()

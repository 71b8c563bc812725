"""The names of the original latent diffusion code and of diffusers for the same tensors.

The original UNet counts its blocks through all resolutions, input_blocks.0 to output_blocks.N, and
a block holds what happens there, a change of resolution included; diffusers counts resolutions and,
within each, residual blocks and transformers apart.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
# How a change of resolution is called in a block, and in diffusers.
_RESAMPLERS = {"op": "downsamplers.0.conv", "conv": "upsamplers.0.conv"}
_UNET_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)\.(weight|bias)")

_ORIGINAL_ENDS = {new: old for old, new in _UNET_ENDS.items()}
_ORIGINAL_RESNET = {new: old for old, new in _UNET_RESNET.items()}
_STAGE = re.compile(
    r"(?:(?P<kind>down|up)_blocks\.(?P<level>\d+)|mid_block)\."
    r"(?P<part>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<layer>.+)"
)

_VAE_LEVEL = re.compile(r"(encoder|decoder)\.(?:down|up)\.(\d+)\.(.+)")
# In this order, on the name without its resolution.
_VAE_LAYERS = (
    (r"^block\.(\d+)\.", r"resnets.\1."),
    (r"^downsample\.", "downsamplers.0."),
    (r"^upsample\.", "upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.0)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.0)\.proj_out\.", r"\1.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
_VAE_PROJECTION = re.compile(r".+\.attentions\.0\.to_\w+(\.0)?\.weight")


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """diffusers' name of every tensor of an original UNet; one that is unknown keeps its own."""
    blocks: dict[tuple[str, int], list[tuple[str, str, str]]] = {}
    renamed = {}
    for name in names:
        stem, _, leaf = name.rpartition(".")
        match = _UNET_BLOCK.fullmatch(name)
        if stem in _UNET_ENDS or match is None:
            renamed[name] = f"{_UNET_ENDS.get(stem, stem)}.{leaf}"
            continue
        # After the block's number comes that of the layer in it, in the middle block the layer.
        layer = match[3] if match[1] == "middle_block" else match[3].partition(".")[2]
        blocks.setdefault((match[1], int(match[2])), []).append((name, layer, leaf))

    level, position = {"input_blocks": 0, "output_blocks": 0}, {}
    for (kind, number), layers in sorted(blocks.items()):
        resampler = next((layer for _, layer, _ in layers if layer in _RESAMPLERS), None)
        if kind == "middle_block":
            stage, index = "mid_block", number // 2
        else:
            stage = f"{'down' if kind == 'input_blocks' else 'up'}_blocks.{level[kind]}"
            index = position[stage] = position.get(stage, -1) + 1
            level[kind] += resampler is not None
        for name, layer, leaf in layers:
            renamed[name] = f"{stage}.{_unet_layer(layer, index)}.{leaf}"
    return renamed


def _unet_layer(layer: str, index: int) -> str:
    if layer in _RESAMPLERS:
        return _RESAMPLERS[layer]
    if layer in _UNET_RESNET:
        return f"resnets.{index}.{_UNET_RESNET[layer]}"
    return f"attentions.{index}.{layer}"


def original_unet_layers(layers: Iterable[str]) -> dict[str, str]:
    """The original name of the layers of a UNet in diffusers' names, all of which are given.

    All, because the blocks before a layer, whose number its original name holds, are told by them.
    """
    matches = {layer: _STAGE.fullmatch(layer) for layer in layers}
    blocks = {match.group("kind", "level", "part", "index") for match in matches.values() if match}
    depth = Counter((kind, level) for kind, level, part, _ in blocks if part == "resnets")
    with_attention = {(kind, level) for kind, level, part, _ in blocks if part == "attentions"}

    def original(layer: str, match: re.Match[str] | None) -> str:
        if match is None:
            return _ORIGINAL_ENDS.get(layer, layer)
        index, in_attention = int(match["index"]), match["part"] == "attentions"
        stage = match.group("kind", "level")
        rest = match["layer"] if in_attention else _ORIGINAL_RESNET.get(match["layer"])
        if match["kind"] is None:
            return f"middle_block.{2 * index + in_attention}.{rest}"
        before = [depth[match["kind"], str(level)] for level in range(int(match["level"]))]
        if match["kind"] == "up":
            if match["part"] == "upsamplers":
                # At the end of the resolution's last block.
                place = 1 + (stage in with_attention)
                return f"output_blocks.{sum(before) + depth[stage] - 1}.{place}.conv"
            return f"output_blocks.{sum(before) + index}.{int(in_attention)}.{rest}"
        # The entrance comes first, and behind every resolution the step to the next.
        first = 1 + sum(before) + len(before)
        if match["part"] == "downsamplers":
            return f"input_blocks.{first + depth[stage]}.0.op"
        return f"input_blocks.{first + index}.{int(in_attention)}.{rest}"

    return {layer: original(layer, match) for layer, match in matches.items()}


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """diffusers' name of every tensor of an original autoencoder."""
    matches = {name: _VAE_LEVEL.fullmatch(name) for name in names}
    highest = max((int(match[2]) for match in matches.values() if match), default=0)
    renamed = {}
    for name, match in matches.items():
        part, rest = (f"{match[1]}.", match[3]) if match else ("", name)
        for old, new in _VAE_LAYERS:
            rest = re.sub(old, new, rest)
        if match:
            # The original decoder counts resolutions from the highest too, diffusers as they run.
            level = int(match[2])
            down = match[1] == "encoder"
            part += f"down_blocks.{level}." if down else f"up_blocks.{highest - level}."
        renamed[name] = part + rest
    return renamed


def rename_vae(
    tensors: Iterable[tuple[str, np.ndarray]], names: dict[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of an original autoencoder as diffusers has them, given `vae_names`.

    Its attention projects by convolutions of size one, where diffusers has linear layers.
    """
    for name, tensor in tensors:
        new = names[name]
        if _VAE_PROJECTION.fullmatch(new):
            tensor = tensor.reshape(tensor.shape[:2])
        yield new, tensor

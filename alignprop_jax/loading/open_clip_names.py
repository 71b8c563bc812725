"""The names of OpenCLIP and of transformers for the tensors of a CLIP.

In OpenCLIP's layout queries, keys and values of a layer stand in one matrix, and projections are
stored transposed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_TRANSPOSED = ("text_projection", "visual.proj")
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_LAYER_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def rename(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The same tensors, one by one, under the names of transformers' CLIPModel."""
    for name, tensor in tensors:
        match = _LAYER.fullmatch(name)
        if name in _NAMES:
            yield _NAMES[name], tensor.T if name in _TRANSPOSED else tensor
        elif match is None:
            if name != "attn_mask":  # a buffer
                yield name, tensor
        else:
            tower = "vision_model" if match[1] else "text_model"
            layer = f"{tower}.encoder.layers.{match[2]}"
            stem, _, leaf = match[3].rpartition(".")
            if match[3].startswith("attn.in_proj_"):
                leaf = leaf.removeprefix("in_proj_")
                for part, rows in zip("qkv", np.split(tensor, 3), strict=True):
                    yield f"{layer}.self_attn.{part}_proj.{leaf}", rows
            else:
                yield f"{layer}.{_LAYER_NAMES.get(stem, stem)}.{leaf}", tensor


def rename_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of what `rename` makes of tensors of these shapes."""
    # Views of one number: no memory stands behind them.
    stand_ins = ((name, np.broadcast_to(0, shape)) for name, shape in shapes.items())
    return {name: tensor.shape for name, tensor in rename(stand_ins)}

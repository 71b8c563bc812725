"""CLIPs in OpenCLIP's layout (Cherti et al., arXiv 2212.07143), as this package's CLIPModel."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from alignprop_jax.errors import UserError
from alignprop_jax.loading import shapes_only
from alignprop_jax.loading.open_clip_names import rename, rename_shapes
from alignprop_jax.loading.pretrained import abstract_params
from alignprop_jax.loading.sources import parse_config
from alignprop_jax.loading.tensor_files import read_shapes, read_tensors
from alignprop_jax.loading.weights import ParamTree, fill_params
from alignprop_jax.models.clip import CLIPConfig, CLIPModel
from alignprop_jax.models.execution import Execution


def load_open_clip(
    path: str | Path, text_heads: int, vision_heads: int, dtype: jnp.dtype = jnp.float32
) -> tuple[CLIPModel, ParamTree]:
    """Loads a ViT CLIP with GELU, the architecture of OpenCLIP's own models.

    Args:
        path: the state dict, as safetensors or as a checkpoint of PyTorch.
        text_heads: attention heads, the one size that the weights do not tell.
        vision_heads: the same of the vision tower.
        dtype: floating type of the weights and of the computation.

    Raises:
        UserError: the file cannot be read or is no such CLIP.
    """
    try:
        shapes = rename_shapes(read_shapes(path))
        config = _config(shapes, text_heads, vision_heads)
    except KeyError as error:
        raise UserError(f"{path}: no CLIP in OpenCLIP's layout; it lacks {error}") from error
    except (IndexError, ValueError) as error:
        raise UserError(f"{path}: no CLIP in OpenCLIP's layout, by its shapes ({error})") from error
    model = CLIPModel(parse_config(config, CLIPConfig.from_dict, path), Execution(jnp.dtype(dtype)))
    if shapes_only.active():
        return model, shapes_only.shapes(abstract_params(model), dtype)
    return model, fill_params(abstract_params(model), rename(read_tensors(path)), path, dtype)


def _config(
    shapes: Mapping[str, tuple[int, ...]], text_heads: int, vision_heads: int
) -> dict[str, Any]:
    """The config of a CLIPModel of transformers."""

    def tower(name: str, num_heads: int) -> dict:
        fc1 = f"{name}.encoder.layers.{{}}.mlp.fc1.weight"
        intermediate_size, hidden_size = shapes[fc1.format(0)]
        num_layers = 0
        while fc1.format(num_layers) in shapes:
            num_layers += 1
        return {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
        }

    vocab_size, _ = shapes["text_model.embeddings.token_embedding.weight"]
    max_length, _ = shapes["text_model.embeddings.position_embedding.weight"]
    patches = shapes["vision_model.embeddings.position_embedding.weight"][0] - 1
    patch_size = shapes["vision_model.embeddings.patch_embedding.weight"][-1]
    return {
        "text_config": {
            **tower("text_model", text_heads),
            "vocab_size": vocab_size,
            "max_position_embeddings": max_length,
            "eos_token_id": vocab_size - 1,  # the last of CLIP's vocabulary
        },
        "vision_config": {
            **tower("vision_model", vision_heads),
            "image_size": math.isqrt(patches) * patch_size,
            "patch_size": patch_size,
        },
        "projection_dim": shapes["visual_projection.weight"][0],
    }

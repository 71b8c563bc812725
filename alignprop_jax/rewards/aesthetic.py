"""The aesthetic score: a linear head on CLIP's normalised image embedding.

The shape of LAION's predictor (github.com/christophschuhmann/improved-aesthetic-predictor), which
AlignProp was evaluated with (arXiv 2310.03739): linear layers without a nonlinearity between.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignprop_jax.errors import UserError
from alignprop_jax.loading.pretrained import ASSETS, load_component, resolve_network
from alignprop_jax.loading.tensor_files import read_tensors
from alignprop_jax.models.clip import CLIPModel
from alignprop_jax.rewards.base import Reward, no_prompt_inputs
from alignprop_jax.rewards.clip_similarity import image_params
from alignprop_jax.rewards.preprocess import CLIPPreprocessor
from alignprop_jax.rewards.registry import register

LAION_HEAD = ASSETS / "laion" / "aesthetic_head_vit_l_14.safetensors"

Head = Sequence[dict[str, Float[Array, "..."]]]


@register("aesthetic")
def make_aesthetic_reward(
    clip: str = "emoji", head: str = "", dtype: jnp.dtype = jnp.float32
) -> Reward:
    """Makes the reward from weights.

    Args:
        clip: the folder or hub id of a transformers CLIPModel, or "emoji".
        head: a file for `load_head`; empty for `aesthetic_head.safetensors` beside the CLIP folder
            or, where there is none, for LAION's on OpenAI's ViT-L/14, which ships with the package.
        dtype: of CLIP's weights and activations. The head stays in float32.

    Raises:
        UserError: weights are missing or do not fit together.
    """
    folder = resolve_network(clip, "clip")
    head_path = Path(head) if head else _find_head(folder)
    model, clip_params = load_component(CLIPModel, folder, dtype)
    preprocess = CLIPPreprocessor.from_folder(folder, model.config.vision.image_size)
    layers = load_head(head_path)
    width = layers[0]["kernel"].shape[0]
    if width != model.config.projection_dim:
        raise UserError(
            f"{head_path}: takes embeddings of {width}, "
            f"the CLIP in {folder} gives {model.config.projection_dim}"
        )

    def score(params, images, prompt_inputs):
        embedding = model.apply(
            {"params": params["clip"]}, preprocess(images), method="get_image_features"
        )
        return apply_head(params["head"], embedding.astype(jnp.float32))

    reward_params = {"clip": image_params(clip_params), "head": layers}
    return Reward("aesthetic", reward_params, score, no_prompt_inputs)


def _find_head(clip: Path) -> Path:
    beside = clip.parent / "aesthetic_head.safetensors"
    return beside if beside.exists() else LAION_HEAD


def apply_head(layers: Head, embedding: Float[Array, "b p"]) -> Float[Array, " b"]:
    """The head's score of embeddings, which it normalises to length 1."""
    x = embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True)
    for layer in layers:
        x = x @ layer["kernel"] + layer["bias"][None]
    return x[:, 0]


def load_head(path: str | Path) -> Head:
    """Reads `layers.N.weight` [out, in] and `layers.N.bias` [out], in the order of N.

    Args:
        path: a safetensors file, or a `.pth` as LAION publishes it.

    Raises:
        UserError: the file is absent or truncated, a tensor has another name or no partner or holds
            something else than finite numbers, or the widths are no chain that ends in 1.
    """
    found: dict[int, dict[str, Array]] = {}
    for name, tensor in read_tensors(path):
        match = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,3})\.(weight|bias)", name)
        if match is None:
            raise UserError(f"{path}: tensor {name} is not named layers.N.weight or layers.N.bias")
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or not np.isfinite(tensor).all():
            raise UserError(f"{path}: tensor {name} holds something else than finite numbers")
        leaf, array = ("bias", tensor) if match[2] == "bias" else ("kernel", tensor.T)
        found.setdefault(int(match[1]), {})[leaf] = jnp.asarray(array, jnp.float32)
    if not found:
        raise UserError(f"{path}: has no tensors, so it is no head")
    width = None
    for number, layer in sorted(found.items()):
        if layer.keys() != {"kernel", "bias"}:
            raise UserError(f"{path}: layers.{number} needs both a weight and a bias")
        kernel, bias = layer["kernel"].shape, layer["bias"].shape
        if len(kernel) != 2 or bias != kernel[1:] or kernel[0] != (width or kernel[0]):
            raise UserError(
                f"{path}: layers.{number} has a weight of shape {list(kernel[::-1])} and a bias of "
                f"shape {list(bias)}" + (f" after a layer of width {width}" if width else "")
            )
        width = kernel[1]
    if width != 1:
        raise UserError(f"{path}: the last layer must give one number, the score, not {width}")
    return [layer for _, layer in sorted(found.items())]

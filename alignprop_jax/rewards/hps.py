"""Human Preference Score v2 (Wu et al., arXiv 2306.09341): OpenCLIP's ViT-H/14, tuned on choices.

The score is the cosine of image and prompt. Reports often show ten or a hundred times as much.
"""

from pathlib import Path

import jax.numpy as jnp

from alignprop_jax.loading import shapes_only
from alignprop_jax.loading.hub import download_file
from alignprop_jax.loading.open_clip import load_open_clip
from alignprop_jax.loading.pretrained import load_component, resolve_model, resolve_tokenizer
from alignprop_jax.loading.tokenizer import load_tokenizer, tokenize
from alignprop_jax.nn.clip import CLIPModel
from alignprop_jax.rewards.base import Reward
from alignprop_jax.rewards.clip_similarity import clip_similarity
from alignprop_jax.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, CLIPPreprocessor
from alignprop_jax.rewards.registry import register

# The network whose checkpoints HPS v2.0 and v2.1 are.
_PUBLISHED = "xswu/HPSv2"
# Of ViT-H/14, in both towers.
_NUM_HEADS = 16


@register("hps")
def make_hps_reward(
    checkpoint: str = "xswu/HPSv2/HPS_v2.1_compressed.pt",
    tokenizer: str = "openai/clip-vit-large-patch14",
    dtype: jnp.dtype = jnp.float32,
) -> Reward:
    """Makes the reward from weights.

    Args:
        checkpoint: the state dict in OpenCLIP's layout, safetensors or PyTorch: a file, or
            OWNER/NAME/FILE on the hub. xswu/HPSv2/HPS_v2_compressed.pt is version 2.0.
        tokenizer: folder or hub id of CLIP's tokenizer, of a pipeline that has it, too.
        dtype: of the weights and activations.

    Raises:
        UserError: a file is missing or damaged.
    """
    tokenizer_folder = resolve_tokenizer(tokenizer)
    if shapes_only.active() and not Path(checkpoint).exists():
        model, params = load_component(CLIPModel, resolve_model(_PUBLISHED), dtype)
    else:
        path = checkpoint if Path(checkpoint).exists() else download_file(checkpoint)
        model, params = load_open_clip(path, _NUM_HEADS, _NUM_HEADS, dtype)
    prompt_tokenizer = load_tokenizer(tokenizer_folder, model.config.text)
    return clip_similarity(
        "hps",
        model,
        params,
        CLIPPreprocessor(model.config.vision.image_size, OPENAI_MEAN, OPENAI_STD),
        lambda prompts: tokenize(prompt_tokenizer, list(prompts)),
        scale=lambda params: 1.0,
    )

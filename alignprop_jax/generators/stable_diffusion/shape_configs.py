"""The configs of diffusers and transformers, read off the shapes of a model's tensors.

A single-file checkpoint has no config.json. Widths, depths and which blocks have transformers show
in names and shapes; what does not is the same in every Stable Diffusion.
"""

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

# Of every CLIP that conditions a Stable Diffusion, and of the UNets from Stable Diffusion 2 on.
_HEAD_DIM = 64
# Stable Diffusion 1 has as many heads whatever the width.
_NUM_HEADS = 8
# The numbers of the size and the crop that Stable Diffusion XL embeds.
_NUM_TIME_IDS = 6


def unet_config(shapes: Shapes, sample_size: int, pooled_dim: int | None) -> dict[str, Any]:
    """The config of a UNet2DConditionModel.

    Args:
        shapes: by diffusers' names.
        sample_size: height and width of the latents it was trained on.
        pooled_dim: size of the pooled text that Stable Diffusion XL's UNet is given; otherwise
            None.

    Raises:
        KeyError: a tensor that every UNet has is missing.
    """
    channels = _widths(shapes, "down_blocks.{}.resnets.0.conv1.weight")
    levels = len(channels)
    layers = [_count(shapes, f"down_blocks.{i}.resnets.{{}}.conv1.weight") for i in range(levels)]
    middle = "mid_block.attentions.0"
    linear = len(shapes[f"{middle}.proj_in.weight"]) == 2

    def transformer_layers(attention: str) -> int:
        return _count(shapes, f"{attention}.transformer_blocks.{{}}.norm1.weight")

    down = [transformer_layers(f"down_blocks.{i}.attentions.0") for i in range(levels)]
    up = [transformer_layers(f"up_blocks.{i}.attentions.0") for i in range(levels)]
    # diffusers gives the middle as many layers as the lowest level, which may itself have none.
    depths = [*(depth or 1 for depth in down[:-1]), transformer_layers(middle)]
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in down],
        "up_block_types": ["CrossAttnUpBlock2D" if n else "UpBlock2D" for n in up],
        "transformer_layers_per_block": depths,
        "cross_attention_dim": shapes[f"{middle}.transformer_blocks.0.attn2.to_k.weight"][1],
        # The number of heads, in spite of the name.
        "attention_head_dim": [
            max(width // _HEAD_DIM, 1) if linear else _NUM_HEADS for width in channels
        ],
        "use_linear_projection": linear,
        "norm_num_groups": 32,
    }
    if "add_embedding.linear_1.weight" in shapes:
        width = shapes["add_embedding.linear_1.weight"][1]
        if pooled_dim is None:
            # Of Stable Diffusion 2 unCLIP, which is given an embedded image.
            return {**config, "class_embed_type": "projection"}
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (width - pooled_dim) // _NUM_TIME_IDS,
            "projection_class_embeddings_input_dim": width,
        }
    return config


def vae_config(shapes: Shapes, scaling_factor: float) -> dict[str, Any]:
    """The config of an AutoencoderKL.

    Args:
        shapes: by diffusers' names.
        scaling_factor: of the latents.

    Raises:
        KeyError: a tensor that every autoencoder has is missing.
    """
    channels = _widths(shapes, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": _count(shapes, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "norm_num_groups": 32,
        "scaling_factor": scaling_factor,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def text_config(shapes: Shapes, hidden_act: str) -> dict[str, Any]:
    """The config of a CLIPTextModel, or with a projection of a CLIPTextModelWithProjection.

    Args:
        shapes: by transformers' names, with the prefix `text_model`.
        hidden_act: name of the activation.

    Raises:
        KeyError: a tensor that every text tower has is missing.
    """
    embeddings = "text_model.embeddings"
    vocab_size, hidden_size = shapes[f"{embeddings}.token_embedding.weight"]
    layer = "text_model.encoder.layers.{}.mlp.fc1.weight"
    config = {
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shapes[layer.format(0)][0],
        "num_hidden_layers": _count(shapes, layer),
        "num_attention_heads": max(hidden_size // _HEAD_DIM, 1),
        "max_position_embeddings": shapes[f"{embeddings}.position_embedding.weight"][0],
        "hidden_act": hidden_act,
        "eos_token_id": vocab_size - 1,  # the last of CLIP's vocabulary
    }
    if "text_projection.weight" in shapes:
        config["projection_dim"] = shapes["text_projection.weight"][0]
    return config


def _widths(shapes: Shapes, name: str) -> list[int]:
    """The first sizes of the tensors called `name` with 0, 1, 2 and so on in its place holder."""
    # One there must be: its KeyError names it.
    return [shapes[name.format(i)][0] for i in range(max(_count(shapes, name), 1))]


def _count(shapes: Shapes, name: str) -> int:
    """How many tensors are called `name` with 0, 1, 2 and so on in its place holder."""
    count = 0
    while name.format(count) in shapes:
        count += 1
    return count

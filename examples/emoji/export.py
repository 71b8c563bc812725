"""The model in the package as a folder of diffusers' layout, weights in half precision."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from alignprop_jax.loading.weights import save_params
from alignprop_jax.nn.clip import CLIPTextConfig
from alignprop_jax.nn.vae import VAEConfig
from examples.emoji.scenes import IMAGE_SIZE

_NORM_GROUPS = 16
# Few groups, so wide ones: a norm over two channels of 16 leaves nothing of a picture's colour.
_VAE_NORM_GROUPS = 4


def clip_config(sizes: Mapping[str, int], tokenizer) -> dict[str, Any]:
    """transformers' CLIPConfig."""
    common = {
        "hidden_size": sizes["width"],
        "intermediate_size": 4 * sizes["width"],
        "num_attention_heads": sizes["num_heads"],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": sizes["width"],
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": sizes["width"],
        "logit_scale_init_value": 2.6592,
        "text_config": {
            "model_type": "clip_text_model",
            **common,
            "num_hidden_layers": sizes["text_layers"],
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **common,
            "num_hidden_layers": sizes["vision_layers"],
            "image_size": IMAGE_SIZE,
            "patch_size": sizes["patch_size"],
            "num_channels": 3,
        },
    }


def vae_config(config: ConfigDict) -> dict[str, Any]:
    """diffusers' AutoencoderKL config; the scaling factor is measured after training."""
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": 1,
        "norm_num_groups": _VAE_NORM_GROUPS,
        "out_channels": 3,
        "sample_size": IMAGE_SIZE,
        "scaling_factor": 1.0,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def unet_config(config: ConfigDict, vae: VAEConfig, text_encoder: CLIPTextConfig) -> dict[str, Any]:
    """diffusers' UNet2DConditionModel config; the highest resolution has no transformers."""
    levels = len(config.channels)
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(config.num_heads),
        "block_out_channels": list(config.channels),
        "cross_attention_dim": text_encoder.hidden_size,
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (levels - 1),
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": vae.latent_channels,
        "layers_per_block": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": _NORM_GROUPS,
        "out_channels": vae.latent_channels,
        "sample_size": IMAGE_SIZE // vae.downscale,
        "up_block_types": ["CrossAttnUpBlock2D"] * (levels - 1) + ["UpBlock2D"],
        "use_linear_projection": True,
    }


def scheduler_config() -> dict[str, Any]:
    """diffusers' DDIMScheduler config: Stable Diffusion's betas, rescaled to end in pure noise.

    With a signal left at the last step the model would never see the noise that sampling starts
    from (Lin et al., arXiv 2305.08891), which asks for v prediction and trailing timesteps.
    """
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": False,
        # Trailing timesteps have no offset, but diffusers warns of any other value here.
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    }


def write_clip(output: Path, config: Mapping[str, Any], params) -> None:
    """Writes both towers to clip/, and the text tower to text_encoder/ where diffusers looks."""
    write_clip_model(output / "clip", config, params)
    text = {"architectures": ["CLIPTextModel"], **config["text_config"]}
    text_params = {"text_model": params["text_model"]}
    write_model(output / "text_encoder", text, text_params, "model.safetensors")


def write_clip_model(folder: Path, config: Mapping[str, Any], params) -> None:
    """Writes both towers and what images they take, but for the tokenizer."""
    write_model(folder, config, params, "model.safetensors")
    _write_image_processor(
        folder,
        {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "do_center_crop": True,
            "size": {"shortest_edge": IMAGE_SIZE},
        },
    )


def _write_image_processor(folder: Path, kind: Mapping[str, Any]) -> None:
    """Writes preprocessor_config.json: which processor, and how all of ours see pictures."""
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
    }
    _write_json(folder / "preprocessor_config.json", {**kind, **common})


def detector_config(clip: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' OwlViTConfig of a detector on a CLIP's towers."""
    ours = {"text_config": "owlvit_text_model", "vision_config": "owlvit_vision_model"}
    towers = {name: {**clip[name], "model_type": model_type} for name, model_type in ours.items()}
    return {
        "architectures": ["OwlViTForObjectDetection"],
        "model_type": "owlvit",
        "projection_dim": clip["projection_dim"],
        "logit_scale_init_value": clip["logit_scale_init_value"],
        **towers,
    }


def write_detector(output: Path, config: Mapping[str, Any], params) -> None:
    """Writes detector/, but for the tokenizer."""
    write_model(output / "detector", config, params, "model.safetensors")
    _write_image_processor(
        output / "detector",
        {
            "image_processor_type": "OwlViTImageProcessor",
            "do_center_crop": False,
            "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        },
    )


def write_pipeline_index(output: Path) -> None:
    """Writes model_index.json and the scheduler's config, which make the folder a pipeline."""
    scheduler = scheduler_config()
    _write_json(output / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(
        output / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def write_model(folder: Path, config: Mapping[str, Any], params, file_name: str) -> None:
    """Writes config.json and the weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    save_params(params, folder / file_name, np.float16)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

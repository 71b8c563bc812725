"""Every key of every config of a model, with values that no model has.

Either the network can be built, or one line names the file, the key and the value.
"""

import functools
import json
import math

import jax
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.loading.pretrained import abstract_params
from alignprop_jax.loading.sources import FolderSource
from alignprop_jax.models import unet, vae
from alignprop_jax.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig
from alignprop_jax.models.owlvit import OwlViT, OwlViTConfig
from alignprop_jax.rewards.preprocess import CLIPPreprocessor, OwlPreprocessor

ABSURD = [
    None,
    True,
    -1,
    0,
    1,
    7,
    10**9,
    10**40,
    0.5,
    1e300,
    math.nan,
    math.inf,
    "",
    "silu",
    "x" * 5000,
    [],
    [1],
    ["x"],
    [[1]],
    [0] * 1000,
    {},
    {"a": 1},
]

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 2,
    "num_attention_heads": None,
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
    "norm_eps": 1e-5,
    "use_linear_projection": True,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
UNET_XL = {
    **UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
VAE = {
    "block_out_channels": [8],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "norm_num_groups": 4,
}
TOWER = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
TEXT = {
    **TOWER,
    "vocab_size": 11,
    "max_position_embeddings": 5,
    "eos_token_id": 2,
    "projection_dim": 4,
}
VISION = {**TOWER, "image_size": 8, "patch_size": 4, "num_channels": 3}
CLIP = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 4}

# What builds the network, a config that it takes, and the keys to change in it.
MODELS = {
    "unet": (unet.UNet, unet.UNetConfig, UNET, [*UNET, *unet._SCHEMA]),
    "unet_xl": (unet.UNet, unet.UNetConfig, UNET_XL, UNET_XL.keys() - UNET.keys()),
    "vae": (vae.AutoencoderKL, vae.VAEConfig, VAE, vae._SCHEMA),
    "clip": (CLIPModel, CLIPConfig, CLIP, CLIP),
    "owlvit": (OwlViT, OwlViTConfig, {**CLIP, "model_type": "owlvit"}, ["model_type"]),
}
# Where two values do not fit together, the message may begin with the other one.
RELATED = {
    "num_attention_heads": ("hidden_size", "block_out_channels"),
    "norm_num_groups": ("block_out_channels",),
    "attention_head_dim": ("block_out_channels",),
    "image_size": ("patch_size",),
    "freq_shift": ("block_out_channels",),
    "addition_embed_type": ("addition_time_embed_dim",),
    "addition_time_embed_dim": ("projection_class_embeddings_input_dim",),
}
PREPROCESSOR = {
    "size": {"shortest_edge": 8},
    "crop_size": {"height": 8, "width": 8},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "do_center_crop": False,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "rescale_factor": 1 / 255,
}


def changed(config, keys):
    """Copies of a config with one value changed, each with the key."""
    for key in dict.fromkeys(keys):
        for value in ABSURD:
            yield key, {**config, key: value}
        if isinstance(config.get(key), dict):
            for inner, other in changed(config[key], config[key]):
                yield inner, {**config, key: other}


def loads(load, file, keys):
    """Whether `load` does; if not, it must say in one line which value of which key is wrong."""
    try:
        load()
    except UserError as error:
        message = str(error)
        assert message.count(str(file)) == 1 and len(message.splitlines()) == 1
        assert len(message) - len(str(file)) < 700
        assert any(f"{key}=" in message or f"key {key}" in message for key in keys)
        return False
    return True


@functools.cache
def build(module, config):
    abstract_params(module(config))


@pytest.mark.parametrize("name", MODELS)
def test_a_config_builds_a_network_or_is_refused_by_key_and_value(tmp_path, name):
    module, parse, good, keys = MODELS[name]
    file = tmp_path / "config.json"

    def load():
        build(module, FolderSource(tmp_path).config("", parse.from_dict))

    file.write_text(json.dumps(good))
    load()
    loaded = []
    for key, config in changed(good, keys):
        file.write_text(json.dumps(config))
        loaded.append(loads(load, file, (key, *RELATED.get(key, ()))))
    assert sum(loaded) < len(loaded) / 3


@pytest.mark.parametrize("kind", [CLIPPreprocessor, OwlPreprocessor])
def test_a_preprocessor_works_or_is_refused_by_key_and_value(tmp_path, kind):
    file = tmp_path / "preprocessor_config.json"
    options = {"pads": False} if kind is OwlPreprocessor else {}

    def load():
        preprocess = kind.from_folder(tmp_path, 8, **options)
        jax.eval_shape(preprocess, jax.ShapeDtypeStruct((1, 16, 16, 3), "float32"))

    file.write_text(json.dumps(PREPROCESSOR))
    load()
    for key, config in changed(PREPROCESSOR, PREPROCESSOR):
        file.write_text(json.dumps(config))
        loads(load, file, (key, "size", "crop_size"))


@pytest.mark.parametrize(
    "parse, config, message",
    [
        (unet.UNetConfig, {**UNET, "norm_num_groups": 3}, "divisible by norm_num_groups=3"),
        (unet.UNetConfig, {**UNET, "attention_head_dim": 3}, "divisible by attention_head_dim=3"),
        (
            unet.UNetConfig,
            {**UNET, "block_out_channels": [2], "norm_num_groups": 1, "freq_shift": 1},
            "block_out_channels=2 .* more than twice freq_shift",
        ),
        (
            unet.UNetConfig,
            {**UNET_XL, "projection_class_embeddings_input_dim": 48},
            "input_dim=48 .* more than 6 times addition_time_embed_dim",
        ),
        (vae.VAEConfig, {**VAE, "block_out_channels": [8, 8]}, "down_block_types=.*2 values"),
        (vae.VAEConfig, {**VAE, "norm_num_groups": 3}, "divisible by norm_num_groups=3"),
        (CLIPTextConfig, {**TEXT, "num_attention_heads": 3}, "divisible by num_attention_heads=3"),
        (
            CLIPConfig,
            {**CLIP, "vision_config": {**VISION, "patch_size": 9}},
            "vision_config.patch_size=9 .*fits 1 to 256 times into image_size=8",
        ),
    ],
)
def test_values_that_do_not_fit_together(parse, config, message):
    with pytest.raises(UserError, match=message):
        parse.from_dict(config)

"""LoRA files of kohya's kind, to and from diffusers, which reads them by converting them itself."""

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.unet import UNet, UNetConfig
from alignprop_jax.loading.pretrained import abstract_params
from alignprop_jax.lora import files
from alignprop_jax.lora.factors import init_lora, layer_shapes, linear_shapes, scale_lora
from alignprop_jax.lora.kohya import KOHYA_FILE, kohya_layers, save_kohya_lora
from tests import torch_pipeline
from tests.random_lora import lora_changes, randomize_lora

peft = pytest.importorskip("peft")
# Stable Diffusion XL's resolutions and residual blocks, narrow and with fewer transformers.
DEEP = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 2, 2],
}


def load_lora(path, unet_params):
    tree, metadata = files.load_lora(path, {"unet": unet_params})
    return tree["unet"], metadata


def unet_shapes(name, **overrides):
    config = {**torch_pipeline.UNETS[name], **overrides}
    return abstract_params(UNet(UNetConfig.from_dict(config)))


def changes_in_diffusers(pipeline, file):
    """What a file adds to each layer, by diffusers' reader and PEFT's arithmetic."""
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="default")
    return {
        name: module.get_delta_weight("default").detach().numpy()
        for name, module in pipeline.unet.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request, tmp_path_factory):
    """A pipeline of diffusers and the shapes of its UNet."""
    folder = tmp_path_factory.mktemp("model")
    if request.param == "sdxl":
        pipeline = torch_pipeline.build_torch_xl_pipeline(folder)
        pipeline.unet = torch_pipeline.build_unet("sdxl", **DEEP)
        return pipeline, unet_shapes("sdxl", **DEEP)
    return torch_pipeline.build_torch_pipeline(folder), unet_shapes("tiny")


def test_diffusers_adds_the_same_to_every_layer(model, tmp_path):
    """All linear layers, also those of residual blocks and of the time's embedding."""
    pipeline, shapes = model
    rank, alpha = 3, 5.0
    layers = tuple(linear_shapes(shapes))
    assert {"time_embedding.linear_2", "up_blocks.1.resnets.0.time_emb_proj"} < set(layers)
    lora = randomize_lora(init_lora(jax.random.key(0), shapes, rank, layers))
    save_kohya_lora(tmp_path / KOHYA_FILE, lora, alpha, shapes, "epsilon")

    expected = lora_changes(scale_lora(lora, alpha / rank))
    actual = changes_in_diffusers(pipeline, tmp_path / KOHYA_FILE)
    pipeline.unload_lora_weights()
    assert actual.keys() == expected.keys()
    for name, change in expected.items():
        assert np.abs(change).max() > 0.1
        np.testing.assert_allclose(actual[name], change, atol=1e-5, err_msg=name)


def test_file_comes_back_with_its_scale(model, tmp_path):
    _, shapes = model
    lora = randomize_lora(init_lora(jax.random.key(0), shapes, 2))
    save_kohya_lora(tmp_path / KOHYA_FILE, lora, 6.0, shapes, "epsilon")
    loaded, _ = load_lora(tmp_path / KOHYA_FILE, shapes)
    jax.tree.map(np.testing.assert_array_equal, loaded, scale_lora(lora, 3.0))


def test_names_of_stable_diffusion_xl_are_the_original_codes(tmp_path):
    """The transformers of the published XL stand at these places."""
    shapes = unet_shapes("sdxl", **DEEP)
    lora = init_lora(jax.random.key(0), shapes)
    save_kohya_lora(tmp_path / KOHYA_FILE, lora, 4.0, shapes, "epsilon")
    layers = {name.partition("_transformer")[0] for name in load_file(tmp_path / KOHYA_FILE)}
    assert layers == {
        *(f"lora_unet_input_blocks_{number}_1" for number in (4, 5, 7, 8)),
        "lora_unet_middle_block_1",
        *(f"lora_unet_output_blocks_{number}_1" for number in range(6)),
    }


def test_resolutions_may_differ_in_depth():
    """0 is the entrance, 1 and 2 belong to the first resolution, 3 to 5 to the second."""
    layers = kohya_layers({"unet": layer_shapes(unet_shapes("sdxl", layers_per_block=[1, 3]))})[
        "unet"
    ]
    assert layers["input_blocks_5_1_proj_in"] == "down_blocks.1.attentions.2.proj_in"
    assert layers["output_blocks_3_1_proj_in"] == "up_blocks.0.attentions.3.proj_in"
    assert layers["output_blocks_4_0_emb_layers_1"] == "up_blocks.1.resnets.0.time_emb_proj"


@pytest.mark.parametrize(
    ("name", "width", "prediction_type", "base_model"),
    [
        ("tiny", 768, "epsilon", ("sd_v1", "False", "stable-diffusion-v1", "diffusers")),
        ("sd2", 1024, "epsilon", ("sd_v2", "True", "stable-diffusion-v2-512", "diffusers")),
        (
            "sd2",
            1024,
            "v_prediction",
            ("sd_v2_v", "True", "stable-diffusion-v2-768-v", "diffusers"),
        ),
        (
            "sdxl",
            2048,
            "epsilon",
            (
                "sdxl_base_v1-0",
                "False",
                "stable-diffusion-xl-v1-base",
                "https://github.com/Stability-AI/generative-models",
            ),
        ),
        ("tiny", 32, "epsilon", None),
    ],
)
def test_header_tells_what_readers_ask_for(tmp_path, name, width, prediction_type, base_model):
    """In the words of kohya's trainers and of modelspec; nothing of a base model of other width."""
    shapes = unet_shapes(name, cross_attention_dim=width)
    lora = init_lora(jax.random.key(0), shapes)
    path = tmp_path / "glossy.safetensors"
    save_kohya_lora(path, lora, 8.0, shapes, prediction_type, {"reward": "hps"})
    with safe_open(path, framework="numpy") as file:
        header = file.metadata()
    expected = {
        "format": "pt",
        "reward": "hps",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "8.0",
    }
    if base_model:
        version, is_sd2, architecture, implementation = base_model
        expected |= {
            "ss_base_model_version": version,
            "ss_v2": is_sd2,
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{architecture}/lora",
            "modelspec.implementation": implementation,
            "modelspec.title": "glossy",
            "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        }
    assert header == expected


LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP = np.ones((2, 16), np.float32), np.ones((16, 2), np.float32)
PAIR = {f"{LAYER}.lora_down.weight": DOWN, f"{LAYER}.lora_up.weight": 4 * UP}


def test_without_alpha_the_rank_is_meant(tmp_path):
    tensors = {f"{LAYER}.lora_down.weight": DOWN, f"{LAYER}.lora_up.weight": UP}
    save_file(tensors, tmp_path / "other.safetensors")
    loaded, _ = load_lora(tmp_path / "other.safetensors", unet_shapes("tiny"))
    (change,) = lora_changes(loaded).values()
    assert (change == 2).all()


def test_ranks_and_alphas_may_differ_and_have_an_axis(tmp_path):
    other = LAYER.replace("to_q", "to_k")
    tensors = {
        f"{LAYER}.lora_down.weight": DOWN,
        f"{LAYER}.lora_up.weight": UP,
        f"{LAYER}.alpha": np.float32([6.0]),
        f"{other}.lora_down.weight": DOWN[:1],
        f"{other}.lora_up.weight": UP[:, :1],
        f"{other}.alpha": np.array(0.5, np.float16),
    }
    save_file(tensors, tmp_path / "other.safetensors")
    loaded, _ = load_lora(tmp_path / "other.safetensors", unet_shapes("tiny"))
    values = {name[-1]: np.unique(change).item() for name, change in lora_changes(loaded).items()}
    assert values == {"q": 6.0, "k": 0.5}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{LAYER}.lora_down.weight": DOWN}, "has lora_A and lacks lora_B"),
        ({"lora_unet_x.lora_down.weight": DOWN}, "lora_unet_x.* that this model does not have"),
        ({f"{LAYER}.hada_w1_a": DOWN}, "hada_w1_a is of a LoHa, which is not supported"),
        ({f"{LAYER}.lokr_w1": DOWN}, "lokr_w1 is of a LoKr, which is not supported"),
        ({f"{LAYER}.dora_scale": DOWN}, "dora_scale is of a DoRA, which is not supported"),
        ({f"{LAYER}.lora_mid.weight": DOWN}, "is of a LoRA of three factors"),
        ({f"{LAYER}.diff": DOWN}, "diff is no tensor of a plain LoRA"),
        ({"lora_te_text_model_x.lora_down.weight": DOWN}, "adapts text_encoder, which this model"),
        ({f"{LAYER}.lora_down.weight": np.ones((2, 5), np.float32)}, r"has shape \[2, 5\]"),
        (PAIR | {f"{LAYER}.alpha": DOWN}, r"alpha has shape \[2, 16\]; it is one number"),
        (PAIR | {f"{LAYER}.alpha": DOWN[0, :1] * np.nan}, "alpha has numbers that are NaN"),
        (PAIR | {f"{LAYER}.alpha": np.array([3e38], np.float32)}, "makes its factors infinite"),
        ({f"{LAYER}.alpha": DOWN[0, :1]}, "no LoRA tensors in it"),
    ],
)
def test_wrong_file_is_refused_by_name(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"other.safetensors: .*{message}"):
        load_lora(tmp_path / "other.safetensors", unet_shapes("tiny"))

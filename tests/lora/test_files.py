"""LoRA files, to and from diffusers and PEFT; see test_lora_images for what they draw."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.unet import UNet, UNetConfig
from alignprop_jax.loading.pretrained import abstract_params
from alignprop_jax.lora import files
from alignprop_jax.lora.factors import init_lora, scale_lora
from alignprop_jax.lora.files import LORA_FILE, save_lora
from tests import torch_pipeline
from tests.random_lora import lora_changes, randomize_lora

peft = pytest.importorskip("peft")

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def unet_params():
    return abstract_params(UNet(UNetConfig.from_dict(torch_pipeline.UNETS["tiny"])))


def load_lora(path, unet_params):
    """The UNet's factors, and the header's entries."""
    tree, metadata = files.load_lora(path, {"unet": unet_params})
    assert tree.keys() == {"unet"}
    return tree["unet"], metadata


def continue_lora(path, fresh, unet_params, scale):
    return files.continue_lora(path, fresh, {"unet": unet_params}, scale)


def add_adapter(unet, **settings):
    """Gives the UNet a PEFT adapter of random factors."""
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = peft.LoraConfig(**{"target_modules": targets, **settings})
    unet.add_adapter(config)
    torch_pipeline.randomize_parameters(unet, seed=5)
    return unet


def peft_changes(unet):
    """PEFT's own account of what its adapter adds to each layer."""
    return {
        name: module.get_delta_weight("default").detach().numpy()
        for name, module in unet.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


def assert_same_changes(actual, expected):
    assert actual.keys() == expected.keys() and len(expected) == 32
    for name, change in expected.items():
        assert np.abs(change).max() > 0.1
        np.testing.assert_allclose(actual[name], change, atol=1e-5, err_msg=name)


def test_our_file_has_one_meaning_for_every_reader(tmp_path, unet_params):
    """With the header, and as a release that ignores it reads the tensors: alpha is the rank."""
    lora = randomize_lora(init_lora(jax.random.key(0), unet_params, 3))
    save_lora(tmp_path / LORA_FILE, lora, alpha=5.0)
    expected = lora_changes(scale_lora(lora, 5 / 3))
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file(load_file(tmp_path / LORA_FILE), bare / LORA_FILE)

    for folder in (tmp_path, bare):
        unet = torch_pipeline.build_unet()
        unet.load_lora_adapter(folder, prefix="unet", weight_name=LORA_FILE, adapter_name="default")
        assert_same_changes(peft_changes(unet), expected)
        loaded, _ = load_lora(folder / LORA_FILE, unet_params)
        assert_same_changes(lora_changes(loaded), expected)


def test_header_records_what_was_trained(tmp_path, unet_params):
    path = tmp_path / "new" / "folder" / LORA_FILE
    trained = {"base_model": "emoji", "reward": "aesthetic"}
    save_lora(path, randomize_lora(init_lora(jax.random.key(0), unet_params, 2)), 4.0, trained)

    with safe_open(path, framework="numpy") as file:
        header = file.metadata()
        assert set(file.keys()) >= {f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"}
        assert file.get_tensor(f"unet.{LAYER}.lora_A.weight").shape == (2, 16)
    adapter = json.loads(header.pop("lora_adapter_metadata"))
    assert header == {
        "format": "pt",
        **trained,
        "rank": "2",
        "alpha": "4.0",
    }
    config = peft.LoraConfig(**{key.removeprefix("unet."): value for key, value in adapter.items()})
    assert config.r == config.lora_alpha == 2
    assert LAYER in config.target_modules
    _, metadata = load_lora(path.parent, unet_params)
    assert metadata == {key: value for key, value in header.items() if key != "format"}


def test_factors_come_back_as_they_were_written(tmp_path, unet_params):
    lora = randomize_lora(init_lora(jax.random.key(0), unet_params, 2))
    save_lora(tmp_path / LORA_FILE, lora, alpha=4.0)
    loaded, _ = load_lora(tmp_path, unet_params)
    jax.tree.map(np.testing.assert_array_equal, loaded, scale_lora(lora, 2.0))


def save_with_metadata(unet, folder):
    torch_pipeline.diffusers.StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=peft.get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )


def save_in_older_names(unet, folder):
    torch_pipeline.diffusers.StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=torch_pipeline.diffusers.utils.convert_state_dict_to_diffusers(
            peft.get_peft_model_state_dict(unet)
        ),
    )


def save_unet_alone(unet, folder):
    unet.save_lora_adapter(folder)


@pytest.mark.parametrize(
    ("save", "settings"),
    [
        (save_with_metadata, {"r": 3, "lora_alpha": 7}),
        (save_with_metadata, {"r": 3, "lora_alpha": 7, "use_rslora": True}),
        (
            save_with_metadata,
            {"r": 3, "lora_alpha": 7, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 5}},
        ),
        (save_in_older_names, {"r": 4, "lora_alpha": 4}),
        (save_unet_alone, {"r": 2, "lora_alpha": 8}),
    ],
)
def test_files_of_diffusers_load(tmp_path, unet_params, save, settings):
    unet = add_adapter(torch_pipeline.build_unet(), **settings)
    save(unet, tmp_path)
    lora, _ = load_lora(tmp_path, unet_params)
    assert_same_changes(lora_changes(lora), peft_changes(unet))


def test_folder_of_peft_loads(tmp_path, unet_params):
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    unet = torch_pipeline.build_unet()
    model = torch_pipeline.randomize_parameters(peft.get_peft_model(unet, config), seed=5)
    model.save_pretrained(tmp_path)
    lora, _ = load_lora(tmp_path, unet_params)
    assert_same_changes(lora_changes(lora), peft_changes(unet))


def test_file_in_half_precision_loads_as_float32(tmp_path, unet_params):
    tensors = {
        f"unet.{LAYER}.lora_A.weight": np.full((2, 16), 0.5, np.float16),
        f"unet.{LAYER}.lora_B.weight": np.full((16, 2), 0.25, jnp.bfloat16),
    }
    save_file(tensors, tmp_path / LORA_FILE)
    lora, metadata = load_lora(tmp_path, unet_params)
    (change,) = lora_changes(lora).values()
    assert change.dtype == np.float32 and (change == 0.25).all() and metadata == {}


A, B = f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"
DOWN, UP = np.ones((2, 16), np.float32), np.ones((16, 2), np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "no LoRA tensors"),
        ({A: DOWN}, f"layer {LAYER} has lora_A and lacks lora_B"),
        ({B: UP}, f"layer {LAYER} has lora_B and lacks lora_A"),
        (
            {A: DOWN, B: np.ones((16, 3), np.float32)},
            "layer .* has a lora_A of rank 2 and a lora_B of rank 3",
        ),
        (
            {A: np.ones((2, 320), np.float32), B: UP},
            rf"{A} has shape \[2, 320\], this model needs \[rank, 16\]; the LoRA was made",
        ),
        (
            {A: DOWN, B: np.ones((320, 2), np.float32)},
            rf"{B} has shape \[320, 2\], this model needs \[16, rank\]; the LoRA was made",
        ),
        (
            {"unet.mid.to_q.lora_A.weight": DOWN},
            "unet.mid.to_q.lora_A.weight is for a layer that this model does not have",
        ),
        (
            {"unet.conv_in.lora_A.weight": DOWN, "unet.conv_in.lora_B.weight": UP},
            r"unet.conv_in.lora_A.weight has shape \[2, 16\], this model needs \[rank, 4, 3, 3\]",
        ),
        (
            {"unet.conv_norm_out.lora_A.weight": DOWN},
            "unet.conv_norm_out.lora_A.weight adapts a layer that is neither linear nor a convol",
        ),
        (
            {"text_encoder.x.lora_A.weight": DOWN},
            ".* adapts text_encoder, which this model",
        ),
        ({f"unet.{LAYER}.lora_B.bias": DOWN}, f"unet.{LAYER}.lora_B.bias is of a LoRA with biases"),
        (
            {f"unet.{LAYER}.lora_C.weight": DOWN},
            ".*lora_C.weight is no tensor of a LoRA",
        ),
        ({f"unet.{LAYER}.lora_magnitude_vector": DOWN}, ".* is of a DoRA, which is not supported"),
        ({"lora_unet_x.alpha": DOWN}, "lora_unet_x.alpha is for a layer that this model does not"),
        ({f"unet.{LAYER}.alpha": DOWN[:1, :1]}, "no LoRA tensors in it"),
        ({A: DOWN * np.nan, B: UP}, f"{A} has numbers that are NaN or infinite"),
        ({A: DOWN, B: UP * np.inf}, f"{B} has numbers that are NaN or infinite"),
        ({A: DOWN.astype(np.int32), B: UP}, f"{A} is of type int32"),
        ({A: DOWN[:0], B: UP[:, :0]}, f"layer {LAYER} is of rank 0"),
        (
            {A: DOWN, A.replace("weight", "one.weight"): DOWN, B: UP},
            ".* and .* are for the same layer; one is needed",
        ),
    ],
)
def test_wrong_file_is_refused_by_name(tmp_path, unet_params, tensors, message):
    save_file(tensors, tmp_path / LORA_FILE)
    with pytest.raises(UserError, match=f"{LORA_FILE}: {message}"):
        load_lora(tmp_path / LORA_FILE, unet_params)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "the header's lora_adapter_metadata: cannot be read as a JSON object"),
        ("[" * 100_000, "the header's lora_adapter_metadata: cannot be read as a JSON object"),
        ("[]", "the header's lora_adapter_metadata: holds \\[\\], where a JSON object belongs"),
        ('{"unet.r": 2}', "its adapter configuration: lacks the key lora_alpha"),
        ('{"lora_alpha": NaN}', "its adapter configuration: lora_alpha=NaN is not supported"),
        (
            '{"lora_alpha": 1e400}',
            "lora_alpha=Infinity is not supported",
        ),
        ('{"lora_alpha": 1, "alpha_pattern": [1]}', "alpha_pattern=\\[1\\] is not supported"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(": 1}}', 'the key "\\(" of alpha_pattern is not'),
        ('{"lora_alpha": 1, "alpha_pattern": {"*": 1}}', 'the key "\\*" of alpha_pattern is not'),
        (
            '{"lora_alpha": 1, "alpha_pattern": {"((.*)*)*x": 1}}',
            "it must be the name of a layer or its end, in which .* may stand twice",
        ),
        ('{"lora_alpha": 1, "alpha_pattern": {".*.*.*x": 1}}', "in which .* may stand twice"),
        (
            '{"lora_alpha": 1, "use_dora": true}',
            "has use_dora: it is a DoRA",
        ),
    ],
)
def test_wrong_header_is_refused(tmp_path, unet_params, header, message):
    save_file({A: DOWN, B: UP}, tmp_path / LORA_FILE, metadata={"lora_adapter_metadata": header})
    with pytest.raises(UserError, match=message):
        load_lora(tmp_path, unet_params)


def test_absent_damaged_and_pickled_files_are_refused(tmp_path, unet_params):
    with pytest.raises(UserError, match=f"no LoRA in this folder; a file {LORA_FILE} is needed"):
        load_lora(tmp_path, unet_params)
    with pytest.raises(UserError, match="nothing.safetensors: no such file"):
        load_lora(tmp_path / "nothing.safetensors", unet_params)
    with pytest.raises(UserError, match="lora.bin: a pickle; convert the LoRA to safetensors"):
        load_lora(tmp_path / "lora.bin", unet_params)
    lora = randomize_lora(init_lora(jax.random.key(0), unet_params, 2))
    save_lora(tmp_path / LORA_FILE, lora, 2.0)
    with open(tmp_path / LORA_FILE, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=f"{LORA_FILE}: truncated, or not a safetensors file"):
        load_lora(tmp_path, unet_params)


def test_training_goes_on_from_the_same_function(tmp_path, unet_params):
    lora = randomize_lora(init_lora(jax.random.key(0), unet_params, 2))
    save_lora(tmp_path / LORA_FILE, lora, alpha=6.0)
    fresh = init_lora(jax.random.key(1), unet_params, 2)
    continued = continue_lora(tmp_path, fresh, unet_params, scale=0.5)
    expected = lora_changes(scale_lora(lora, 3.0))
    for name, change in lora_changes(scale_lora(continued, 0.5)).items():
        np.testing.assert_allclose(change, expected[name], atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "targets", "message"),
    [
        (3, ("to_q", "to_k"), "is of rank 2; config.lora.rank=3 must be the same"),
        (2, ("to_q",), "adapts .*to_k; config.lora.targets must name the layers it adapts"),
        (2, ("to_q", "to_k", "to_v"), "lacks .*to_v; config.lora.targets"),
    ],
)
def test_going_on_with_other_factors_is_refused(tmp_path, unet_params, rank, targets, message):
    lora = init_lora(jax.random.key(0), unet_params, 2, ("to_q", "to_k"))
    save_lora(tmp_path / LORA_FILE, lora, alpha=2.0)
    fresh = init_lora(jax.random.key(1), unet_params, rank, targets)
    with pytest.raises(UserError, match=f"lora.init={tmp_path} {message}"):
        continue_lora(tmp_path, fresh, unet_params, 1.0)


def test_folder_that_cannot_be_written_is_refused(tmp_path, unet_params):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        save_lora(
            tmp_path / "file" / LORA_FILE,
            randomize_lora(init_lora(jax.random.key(0), unet_params, 2)),
            2.0,
        )

"""The program that trains the model, at the smallest widths, two steps a part."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict

from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.generators.stable_diffusion.unet import UNet, UNetConfig
from alignprop_jax.loading.pretrained import abstract_params
from alignprop_jax.loading.tensor_files import read_safetensors
from alignprop_jax.rewards import make_reward
from examples.emoji import recipe, train_model
from tests.synthetic_scenes import make_sprites

FIRST_PARTS = tuple(part for part in train_model.PARTS if part != "decoder")
VAE = "vae/diffusion_pytorch_model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


def nano_recipe(num_steps):
    config = recipe.get_config()
    for part in train_model.PARTS:
        config[part].num_steps = num_steps
        config[part].batch_size = 4
    for clip in (config.clip, config.scene_clip):
        clip.width, clip.num_heads, clip.patch_size = 16, 2, 32
        clip.text_layers = clip.vision_layers = 1
    config.aesthetic_head.widths = (16, 8, 8, 8, 8, 1)
    config.aesthetic_head.num_scenes = 64
    config.vae.channels = (8, 8, 8, 8)
    config.vae.latent_channels = 4
    config.unet.channels = (16,)
    config.unet.num_heads = (2,)
    config.unet.num_scenes = config.unet_scenes.num_scenes = 64
    return config


@pytest.fixture(scope="module")
def run_parts(tmp_path_factory):
    """Runs the program on synthetic pictures for the parts named; returns the model's folder."""
    root = tmp_path_factory.mktemp("model")

    def run(*parts, num_steps=2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_model, "prepare", lambda data, workdir: None)
            patch.setattr(train_model, "load_sprites", lambda workdir: make_sprites())
            # Compiling is nearly all of the time here.
            optimized = jax.config.read("jax_disable_most_optimizations")
            jax.config.update("jax_disable_most_optimizations", True)
            try:
                train_model.train_model(
                    nano_recipe(num_steps), root, root / "run", root / "model", parts
                )
            finally:
                jax.config.update("jax_disable_most_optimizations", optimized)
        return root / "model"

    return run


@pytest.fixture(scope="module")
def model(run_parts):
    """The folder before the decoder is trained on."""
    return run_parts(*FIRST_PARTS)


def assert_all_finite(tree):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_every_part_is_trained_into_one_pipeline(model):
    sd, params, (tokenizer,) = load_stable_diffusion(model)
    assert_all_finite(params)
    assert sd.unet.config.channels == (16,)
    assert sd.unet.config.context_dim == sd.text_encoders[0].config.hidden_size == 16
    assert sd.scheduler.prediction_type == "v_prediction"
    assert sd.vae.config.scaling_factor not in (1.0, 0.18215)
    assert tokenizer.model_max_length == 16
    # Zero before the first step.
    assert np.abs(params["unet"]["conv_out"]["kernel"]).max() > 0
    index = json.loads((model / "model_index.json").read_text())
    for component in ("scheduler", "text_encoder", "tokenizer", "unet", "vae"):
        assert index[component][0] in ("diffusers", "transformers")
        assert (model / component).is_dir()


@pytest.mark.slow
def test_scaled_latents_have_unit_variance(model):
    sd, params, _ = load_stable_diffusion(model)
    latents, _ = train_model.encode_scenes(
        sd.vae, params["vae"], train_model.SceneSampler(make_sprites()), 64, seed=1
    )
    scaled = latents.astype(np.float32) * sd.vae.config.scaling_factor
    assert scaled.std() == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_aesthetic_reward_finds_clip_and_head(model):
    options = {"aesthetic": {"clip": str(model / "clip")}}
    reward = make_reward("aesthetic", None, options)
    scores = reward.score(reward.params, jnp.ones((2, 64, 64, 3)), reward.prepare(["a", "b"]))
    assert scores.shape == (2,)
    assert_all_finite(scores)


@pytest.mark.slow
def test_agreement_reward_is_of_the_clip_of_scenes(model):
    reward = make_reward("clip_score", None, {"clip_score": {"clip": str(model / "scene_clip")}})
    scores = reward.score(reward.params, jnp.ones((2, 64, 64, 3)), reward.prepare(["a", "b"]))
    assert scores.shape == (2,)
    assert_all_finite(scores)


@pytest.mark.slow
def test_started_again_it_trains_nothing_twice(model, run_parts):
    written = (model / UNET).read_bytes()
    run_parts("unet_scenes")
    assert (model / UNET).read_bytes() == written


@pytest.mark.slow
def test_detector_is_one_of_transformers(model):
    reward = make_reward("count", None, {"count": {"detector": str(model / "detector")}})
    inputs = reward.prepare(["two cats", "an ant"])
    scores = reward.score(reward.params, jnp.ones((2, 64, 64, 3)), inputs)
    assert scores.shape == (2,)
    assert_all_finite(scores)
    peer, info = transformers.OwlViTForObjectDetection.from_pretrained(
        model / "detector", output_loading_info=True
    )
    assert peer.config.vision_config.patch_size == 32
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.slow
def test_unet_that_is_there_is_where_training_starts(model, run_parts):
    written = dict(read_safetensors(model / UNET))
    shutil.rmtree(model.parent / "run" / "unet")
    # The learning rate of the very first step is zero.
    run_parts("unet", num_steps=1)
    for name, tensor in read_safetensors(model / UNET):
        np.testing.assert_array_equal(tensor, written[name])


@pytest.mark.slow
def test_decoder_changes_alone(model, run_parts):
    before = dict(read_safetensors(model / VAE))
    run_parts("decoder")
    after = dict(read_safetensors(model / VAE))
    assert after.keys() == before.keys()
    changed = {name.split(".")[0] for name in after if (after[name] != before[name]).any()}
    assert changed == {"decoder", "post_quant_conv"}


def test_residual_branches_of_a_new_unet_are_off():
    module = UNet(
        UNetConfig(
            channels=(16, 16),
            layers_per_block=(1, 1),
            transformer_layers=(1, 1),
            num_heads=(2, 2),
            down_attention=(True, False),
            up_attention=(False, True),
            norm_num_groups=8,
        )
    )
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape), abstract_params(module))
    zeroed = {
        "/".join(keys[-2:])
        for keys, leaf in flatten_dict(train_model._with_residuals_off(ones)).items()
        if not leaf.any()
    }
    layers = ("conv2", "proj_out", "conv_out", "net.2", "to_out.0")
    assert zeroed == {f"{layer}/{leaf}" for layer in layers for leaf in ("kernel", "bias")}


def test_flags_are_checked_before_anything_is_trained(tmp_path):
    command = [sys.executable, "-m", "examples.emoji.train_model", f"--data={tmp_path}"]
    command += [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'model'}"]
    unknown = subprocess.run([*command, "--part=eyes"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert unknown.stderr.count("\n") == 1 and "eyes" in unknown.stderr
    empty = subprocess.run(command, capture_output=True, text=True)
    assert empty.returncode == 1
    assert "fetch_data.sh" in empty.stderr.splitlines()[-1]
    assert not (tmp_path / "model").exists()

"""The UNet against diffusers' UNet2DConditionModel, random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.unet import UNet, UNetConfig
from tests import torch_pipeline
from tests.parity import assert_parity, params_from_torch


@pytest.mark.parametrize("name", ["odd", "sd2"])
def test_outputs_and_gradients_equal_diffusers(name):
    peer = torch_pipeline.build_unet(name)
    unet = UNet(UNetConfig.from_dict(peer.config))
    size = peer.config.sample_size
    rng = np.random.default_rng(1)
    # A size the model was not made for, and not square.
    sample = rng.standard_normal((2, 4, size, size + 4)).astype(np.float32)
    timesteps = np.array([981, 3])
    context = rng.standard_normal((2, 7, peer.config.cross_attention_dim)).astype(np.float32)

    assert_parity(
        unet,
        peer,
        lambda params, *inputs: unet.apply({"params": params}, *inputs),
        lambda *inputs: peer(*inputs).sample,
        (sample, timesteps, context),
    )


def test_stable_diffusion_xl_equals_diffusers():
    peer = torch_pipeline.build_unet("sdxl")
    unet = UNet(UNetConfig.from_dict(peer.config))
    rng = np.random.default_rng(1)
    sample = rng.standard_normal((2, 4, 8, 12)).astype(np.float32)
    context = rng.standard_normal((2, 7, 56)).astype(np.float32)
    pooled = rng.standard_normal((2, 16)).astype(np.float32)
    time_ids = np.array([[8, 12, 0, 0, 8, 12], [30, 20, 3, 1, 8, 12]])

    assert_parity(
        unet,
        peer,
        lambda params, *inputs: unet.apply({"params": params}, *inputs),
        lambda sample, timesteps, context, pooled, time_ids: (
            peer(
                sample,
                timesteps,
                context,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
            ).sample
        ),
        (sample, np.array([981, 3]), context, pooled, time_ids),
    )


def test_each_image_meets_two_prompts_in_transformers_of_two_layers():
    peer = torch_pipeline.build_unet("tiny", transformer_layers_per_block=2)
    unet = UNet(UNetConfig.from_dict(peer.config))
    rng = np.random.default_rng(1)
    sample = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    context = rng.standard_normal((4, 7, 32)).astype(np.float32)
    assert_parity(
        unet,
        peer,
        lambda params, *inputs: unet.apply({"params": params}, *inputs),
        lambda sample, timesteps, context: (
            peer(sample.repeat_interleave(2, 0), timesteps.repeat_interleave(2, 0), context).sample
        ),
        (sample, np.array([981, 3]), context),
    )


def test_one_timestep_for_all_images():
    unet = UNet(UNetConfig.from_dict(torch_pipeline.UNETS["tiny"]))
    rng = np.random.default_rng(1)
    sample = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    context = rng.standard_normal((2, 3, 32)).astype(np.float32)
    params = params_from_torch(torch_pipeline.build_unet("tiny"), unet)

    apply = jax.jit(lambda t: unet.apply({"params": params}, sample, t, context))

    np.testing.assert_array_equal(apply(jnp.int32(7)), apply(jnp.array([7, 7])))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "gelu"),
        ("addition_embed_type", "image"),
        ("class_embed_type", "timestep"),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "SkipUpBlock2D"]),
        ("mid_block_type", "UNetMidBlock2D"),
        ("layers_per_block", [1, 1, 1]),
        ("resnet_time_scale_shift", "scale_shift"),
        ("only_cross_attention", True),
    ],
)
def test_unsupported_setting_is_refused_by_name(key, value):
    config = {**torch_pipeline.UNETS["tiny"], key: value}
    with pytest.raises(UserError, match=key):
        UNetConfig.from_dict(config)

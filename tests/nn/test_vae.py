"""The autoencoder against diffusers' AutoencoderKL, random weights."""

import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.nn.vae import AutoencoderKL, VAEConfig
from tests import torch_pipeline
from tests.parity import assert_parity


@pytest.mark.parametrize("name", ["odd", "sd2"])
def test_encoder_equals_diffusers(name):
    peer = torch_pipeline.build_vae(name)
    vae = AutoencoderKL(VAEConfig.from_dict(peer.config))
    # Odd sizes on the way down: the padding of the strided convolutions shows.
    images = np.random.default_rng(1).uniform(-1, 1, (2, 3, 20, 12)).astype(np.float32)

    def peer_encode(x):
        posterior = peer.encode(x).latent_dist
        return posterior.mean, posterior.logvar

    assert_parity(
        vae,
        peer,
        lambda params, x: vae.apply({"params": params}, x, method="encode"),
        peer_encode,
        (images,),
    )


@pytest.mark.parametrize("name", ["odd", "sd2"])
def test_decoder_equals_diffusers(name):
    peer = torch_pipeline.build_vae(name)
    vae = AutoencoderKL(VAEConfig.from_dict(peer.config))
    latents = np.random.default_rng(1).standard_normal((2, 4, 3, 5)).astype(np.float32)

    assert_parity(
        vae,
        peer,
        lambda params, z: vae.apply({"params": params}, z, method="decode"),
        lambda z: peer.decode(z).sample,
        (latents,),
    )


def test_without_the_convolutions_around_the_latents():
    peer = torch_pipeline.build_vae("tiny", use_quant_conv=False, use_post_quant_conv=False)
    vae = AutoencoderKL(VAEConfig.from_dict(peer.config))
    images = np.random.default_rng(1).uniform(-1, 1, (1, 3, 8, 8)).astype(np.float32)

    assert_parity(
        vae,
        peer,
        lambda params, x: vae.apply({"params": params}, x),
        lambda x: peer(x).sample,
        (images,),
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "relu"),
        ("shift_factor", 0.1),
        ("down_block_types", ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
        ("mid_block_add_attention", False),
    ],
)
def test_unsupported_setting_is_refused_by_name(key, value):
    config = {"block_out_channels": (16, 32), key: value}
    with pytest.raises(UserError, match=key):
        VAEConfig.from_dict(config)

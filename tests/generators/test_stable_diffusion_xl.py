"""Whole samples of a Stable Diffusion XL against diffusers' pipeline, and what it is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.generators.stable_diffusion.prompts import encode
from alignprop_jax.nn.execution import Execution
from tests import torch_pipeline
from tests.chains import make_sample
from tests.parity import QUICK_COMPILATION
from tests.torch_pipeline import torch

PROMPTS = ["a cat", "three dogs"]
# Not square, and not the size that the UNet is said to be trained on.
HEIGHT, WIDTH = 24, 32


@pytest.fixture(scope="module", params=[True, False])
def pipeline(request, tmp_path_factory):
    """A folder and diffusers' pipeline of it; once with zeros for no negative prompt."""
    folder = tmp_path_factory.mktemp("xl")
    peer = torch_pipeline.build_torch_xl_pipeline(
        folder, force_zeros_for_empty_prompt=request.param
    )
    return folder, peer


@pytest.mark.parametrize("negative_prompt", ["", "blurry"])
def test_guided_sample_equals_diffusers(pipeline, negative_prompt):
    folder, peer = pipeline
    sd, params, tokenizers = load_stable_diffusion(folder, image_size=(HEIGHT, WIDTH))
    assert sd.latent_shape == (12, 16, 4) and sd.sample_shape == (HEIGHT, WIDTH, 3)
    latents = np.random.default_rng(0).standard_normal((2, 12, 16, 4)).astype(np.float32)
    wanted = peer(
        PROMPTS,
        negative_prompt=[negative_prompt] * 2 if negative_prompt else None,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=3,
        guidance_scale=4.0,
        latents=torch.from_numpy(latents.transpose(0, 3, 1, 2)),
        output_type="np",
    ).images

    encoded = encode(sd, params, tokenizers, [negative_prompt, *PROMPTS])
    sample = jax.jit(make_sample(sd, 3, 4.0), compiler_options=QUICK_COMPILATION)
    images = sample(params, None, latents, encoded[1:], encoded[:1], jax.random.key(0))

    assert np.asarray(images).std() > 0.05
    np.testing.assert_allclose(images, wanted, rtol=0, atol=1e-4)


def test_the_decoder_stays_in_float32(tmp_path):
    torch_pipeline.build_torch_xl_pipeline(tmp_path)
    sd, params, _ = load_stable_diffusion(tmp_path, Execution(jnp.dtype("bfloat16")))
    assert {x.dtype for x in jax.tree.leaves(params["unet"])} == {np.dtype("bfloat16")}
    assert sd.vae.dtype == np.float32
    assert {x.dtype for x in jax.tree.leaves(params["vae"])} == {np.dtype("float32")}


def test_a_size_that_does_not_fit_the_unet_is_refused_by_name(tmp_path):
    torch_pipeline.build_torch_xl_pipeline(tmp_path)
    with pytest.raises(UserError, match="sampler.width is 30; .* a multiple of 4"):
        load_stable_diffusion(tmp_path, image_size=(32, 30))

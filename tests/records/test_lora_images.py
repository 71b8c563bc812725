"""Our LoRA files draw in diffusers what their factors draw here."""

import jax
import numpy as np
import pytest

from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.generators.stable_diffusion.prompts import encode
from alignprop_jax.lora.factors import init_lora, scale_lora
from alignprop_jax.lora.files import LORA_FILE, save_lora
from alignprop_jax.lora.kohya import KOHYA_FILE, save_kohya_lora
from tests import torch_pipeline
from tests.chains import make_sample
from tests.parity import QUICK_COMPILATION
from tests.random_lora import randomize_lora
from tests.torch_pipeline import torch

pytest.importorskip("peft")

PROMPTS, NUM_STEPS, GUIDANCE_SCALE, ALPHA = ["a cat", "two dogs"], 3, 4.0, 5.0
BUILD = {
    "sd": torch_pipeline.build_torch_pipeline,
    "sdxl": torch_pipeline.build_torch_xl_pipeline,
}


@pytest.fixture(scope="module", params=list(BUILD))
def drawn(request, tmp_path_factory):
    """diffusers' pipeline, our UNet's parameters, noise, factors and our images with them."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = BUILD[request.param](folder)
    sd, params, tokenizers = load_stable_diffusion(folder)
    # Larger factors make a random network amplify rounding, here and in PyTorch.
    lora = randomize_lora(init_lora(jax.random.key(0), params["unet"], rank=3), size=0.15)
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    encoded = encode(sd, params, tokenizers, ["", *PROMPTS])
    sampler = make_sample(sd, NUM_STEPS, GUIDANCE_SCALE)
    sample = jax.jit(sampler, compiler_options=QUICK_COMPILATION)
    frozen = {"unet": params["unet"], "vae": params["vae"]}
    inputs = (latents, encoded[1:], encoded[:1], jax.random.key(0))
    scaled = scale_lora(lora, ALPHA / 3)
    images = sample(frozen, scaled, *inputs)
    base = sample(frozen, jax.tree.map(np.zeros_like, scaled), *inputs)
    assert np.abs(base - images).mean() > 0.01
    return pipeline, params["unet"], latents, lora, images


@pytest.mark.parametrize("name", [LORA_FILE, KOHYA_FILE])
def test_diffusers_makes_the_same_images_from_our_file(drawn, tmp_path, name):
    pipeline, unet_params, latents, lora, images = drawn
    if name == LORA_FILE:
        save_lora(tmp_path / name, lora, ALPHA)
    else:
        save_kohya_lora(tmp_path / name, lora, ALPHA, unet_params, "epsilon")
    pipeline.load_lora_weights(tmp_path, weight_name=name)
    theirs = pipeline(
        PROMPTS,
        latents=torch.from_numpy(latents.transpose(0, 3, 1, 2)),
        num_inference_steps=NUM_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        output_type="np",
    ).images
    pipeline.unload_lora_weights()
    np.testing.assert_allclose(images, theirs, atol=1e-4)

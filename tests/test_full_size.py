"""Stable Diffusion 1.5, 2.1 and XL at their real sizes against diffusers, random weights.

`pytest -m full_size -s tests/test_full_size.py -k sdxl` prints a row of docs/models.md.
"""

import resource
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.generators.stable_diffusion.prompts import encode
from alignprop_jax.lora.factors import count_parameters
from tests.chains import make_sample
from tests.parity import to_nhwc

pytestmark = pytest.mark.full_size


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl"])
def loaded(request, tmp_path_factory):
    from tests import full_size_reference as reference

    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", reference.__name__, request.param, str(folder)]
    subprocess.run(command, check=True)
    size = reference.IMAGE_SIZES[request.param]
    began = time.perf_counter()
    sd, params, tokenizers = load_stable_diffusion(folder / "model", image_size=size)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - began
    number = count_parameters(params)
    print(
        f"\n{request.param}: {number / 1e6:.1f}M parameters, loaded in {seconds:.0f} s, "
        f"{number * 4 / 1e9:.1f} GB in float32, peak memory {_peak_gb():.1f} GB"
    )
    yield reference, sd, params, tokenizers, dict(np.load(folder / "reference.npz"))


def _peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def assert_close(what, actual, wanted):
    """Within 1e-4 of the greatest value there is."""
    actual, wanted = np.asarray(actual), to_nhwc(wanted)
    error = np.abs(actual - wanted).max() / np.abs(wanted).max()
    print(f"{what}: relative error {error:.1e}")
    assert error < 1e-4


def test_unet(loaded):
    _, sd, params, _, arrays = loaded
    added = (arrays["pooled"], arrays["time_ids"]) if sd.unet.config.pooled_dim else ()
    inputs = (to_nhwc(arrays["sample"]), np.array([981, 3]), arrays["context"], *added)
    output = jax.jit(sd.unet.apply)({"params": params["unet"]}, *inputs)
    assert_close("unet", output, arrays["unet"])


def test_vae(loaded):
    _, sd, params, _, arrays = loaded
    variables = {"params": params["vae"]}
    apply = jax.jit(sd.vae.apply, static_argnames="method")
    mean, _ = apply(variables, to_nhwc(arrays["pixels"]), method="encode")
    assert_close("vae, encoder", mean, arrays["vae_mean"])
    decoded = apply(variables, to_nhwc(arrays["vae_mean"]), method="decode")
    assert_close("vae, decoder", decoded, arrays["vae_decoded"])


def test_text_encoders(loaded):
    reference, sd, params, tokenizers, arrays = loaded
    encoded = encode(sd, params, tokenizers, reference.PROMPTS)
    assert_close("text", encoded.hidden_states, arrays["text"])
    if encoded.pooled is not None:
        assert_close("pooled text", encoded.pooled, arrays["text_pooled"])


def test_guided_sample(loaded):
    reference, sd, params, tokenizers, arrays = loaded
    encoded = encode(sd, params, tokenizers, [reference.NEGATIVE, *reference.PROMPTS])
    sample = jax.jit(make_sample(sd, reference.NUM_STEPS, reference.GUIDANCE))
    frozen = {"unet": params["unet"], "vae": params["vae"]}
    images = sample(
        frozen, None, to_nhwc(arrays["latents"]), encoded[1:], encoded[:1], jax.random.key(0)
    )
    # Values that are clipped on both sides say nothing.
    assert ((arrays["images"] > 0) & (arrays["images"] < 1)).mean() > 0.3
    difference = np.abs(np.asarray(images) - arrays["images"])
    print(f"images: greatest error {difference.max():.1e}; peak memory {_peak_gb():.1f} GB")
    assert difference.max() < 1e-3

"""One LoRA or two, as the flags name them, against diffusers and PEFT."""

import subprocess
import sys

import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.lora.files import LORA_FILE
from alignprop_jax.lora.mixing import BASE_MODEL, NO_LORA, LoraMix, parse_timesteps
from alignprop_jax.sample import sample
from tests.random_lora import save_random_lora
from tests.torch_pipeline import diffusers, torch

pytest.importorskip("peft")

PROMPTS = ["a cat", "a dog"]
NUM_STEPS = 4  # at timesteps 751, 501, 251 and 1


@pytest.fixture(scope="module")
def model(nano_config):
    return nano_config.parent / "model"


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "latents.npy"
    np.save(path, np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """Two LoRAs of different rank, scale and layers, of a size that shows."""
    folder = tmp_path_factory.mktemp("loras")
    save_random_lora(folder / "a" / LORA_FILE, model, 0, 2, 2.0, ("to_q", "to_v"))
    save_random_lora(folder / "b" / LORA_FILE, model, 1, 3, 2.0, ("to_v", "to_out.0"))
    return str(folder / "a"), str(folder / "b")


def peer_images(model, latents, files, weights, timesteps):
    """diffusers and PEFT; the adapters are off where a step's timestep is out of the range."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    names = ["a", "b"][: len(files)]
    for name, file in zip(names, files, strict=True):
        pipeline.load_lora_weights(file, weight_name=LORA_FILE, adapter_name=name)
    if files:
        pipeline.set_adapters(names, adapter_weights=weights)
    predict = pipeline.unet.forward

    def forward(x_t, timestep, *args, **kwargs):
        if files and timesteps is not None:
            on = timesteps[0] >= timestep >= timesteps[1]
            (pipeline.unet.enable_lora if on else pipeline.unet.disable_lora)()
        return predict(x_t, timestep, *args, **kwargs)

    pipeline.unet.forward = forward
    return pipeline(
        PROMPTS,
        latents=torch.from_numpy(np.load(latents)),
        num_inference_steps=NUM_STEPS,
        guidance_scale=5.0,
        output_type="np",
    ).images


# PEFT warns of a second adapter, which is meant.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.parametrize(
    ("count", "mix", "timesteps"),
    [(2, 0.3, None), (2, 1.0, None), (1, 0.4, None), (2, 0.6, (751, 251)), (1, None, (500, 0))],
)
def test_images_equal_those_of_diffusers(model, latents, files, count, mix, timesteps):
    weights = [1.0] if mix is None else [mix, 1 - mix][:count]
    expected = peer_images(model, latents, files[:count], weights, timesteps)
    lora = LoraMix(files[:count], mix, timesteps)
    images = sample(str(model), PROMPTS, lora=lora, latents=latents, num_steps=NUM_STEPS)
    np.testing.assert_allclose(images, expected, atol=2e-4)
    base = sample(str(model), PROMPTS, latents=latents, num_steps=NUM_STEPS)
    assert np.abs(base - images).mean() > 0.005


def test_the_program_mixes_what_its_flags_name(model, latents, files, tmp_path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.npy"
    prompts.write_text("\n".join(PROMPTS))
    command = [sys.executable, "-m", "alignprop_jax.sample", f"--model={model}"]
    command += [f"--prompts={prompts}", f"--latents={latents}", f"--num_steps={NUM_STEPS}"]
    command += ["--lora", files[0], "--lora", files[1], "--mix", "0.6"]
    command += ["--lora_timesteps=751:251", f"--output={output}"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert process.returncode == 0, process.stderr
    lora = LoraMix(files, 0.6, (751, 251))
    expected = sample(str(model), PROMPTS, lora=lora, latents=latents, num_steps=NUM_STEPS)
    np.testing.assert_allclose(np.load(output), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((("a", "b", "c"), 0.5), "3 --lora are given; two can be mixed"),
        ((("a", "b"),), "two --lora are given; say how much of the first, with --mix"),
        ((("a", "none"), 0.5), "--lora=none cannot be mixed"),
        ((("a",), 1.5), "--mix is 1.5; it must lie between 0 and 1"),
        ((("a",), -0.1), "--mix is -0.1; it must lie"),
        ((("a",), float("nan")), "--mix is nan; it must lie"),
        (((), 0.5), "--mix needs a LoRA; give --lora=FILE"),
        ((("none",), 0.5), "--mix needs a LoRA"),
        (((), None, (1000, 0)), "--lora_timesteps needs a LoRA"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(UserError, match=message):
        LoraMix(*settings)


def test_no_lora_is_the_base_model():
    assert NO_LORA.load({}) is None and LoraMix((BASE_MODEL,)).load({}) is None


def test_a_mix_says_what_it_is():
    assert str(NO_LORA) == str(LoraMix((BASE_MODEL,))) == "none"
    assert str(LoraMix(("a",))) == "a"
    assert str(LoraMix(("a",), 0.3)) == "0.3 a"
    mix = LoraMix(("a", "b"), 0.3, (1000, 600))
    assert str(mix) == "0.3 a + 0.7 b at timesteps 1000 to 600"


def test_timesteps_are_read():
    assert parse_timesteps("1000:600") == (1000, 600)
    assert parse_timesteps("7:7") == (7, 7)
    for text in ("600:1000", "1000", "1000:-1", "a:b", "", "1000:600:0"):
        with pytest.raises(UserError, match=f"--lora_timesteps is '{text}'; give HIGH:LOW"):
            parse_timesteps(text)

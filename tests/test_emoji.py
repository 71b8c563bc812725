"""The model in the package: what it draws, and that diffusers draws the same."""

import numpy as np
import pytest

from alignprop_jax.evaluation.judges import find_judges
from alignprop_jax.loading.pretrained import ASSETS, EMOJI, resolve_model
from alignprop_jax.sample import sample

PROMPTS = [f"a {animal}" for animal in ("cat", "horse", "spider", "bird", "fox", "fish", "duck")]
PROMPTS += ["a snail", "a lobster", "an octopus", "a bear", "a camel"]
SETTINGS = {"num_steps": 6, "guidance_scale": 2.5}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "latents.npy"
    rng = np.random.default_rng(0)
    np.save(path, rng.standard_normal((len(PROMPTS), 4, 16, 16)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def images(latents):
    return sample(EMOJI, PROMPTS, latents=latents, batch_size=12, **SETTINGS)


def test_diffusers_draws_the_same(latents, images):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        resolve_model(EMOJI), dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS,
        latents=torch.from_numpy(np.load(latents)),
        num_inference_steps=SETTINGS["num_steps"],
        guidance_scale=SETTINGS["guidance_scale"],
        output_type="np",
    ).images
    np.testing.assert_allclose(images, expected, atol=2e-3)


def test_the_animals_are_recognized(images):
    """In few steps and one sample each; docs/results.md has the full count."""
    judges = find_judges(EMOJI)
    assert judges["recognized"](images, PROMPTS).sum() >= 10
    # The recognizer does not just say what it is asked.
    assert judges["recognized"](images, [*PROMPTS[1:], PROMPTS[0]]).sum() <= 2
    assert 0 <= judges["glossy"](images, PROMPTS).mean() <= 0.7


def test_all_weights_together_are_small():
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert size < 40e6

import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from alignprop_jax.errors import UserError
from alignprop_jax.sample import make_image_keys, read_latents, sample, write_output

PROMPTS = ["a cat", "a dog on a boat", "a fox"]


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "latents.npy"
    np.save(path, np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def images(nano_config, latents):
    return sample(
        str(nano_config.parent / "model"),
        PROMPTS,
        latents=latents,
        negative_prompt="bad",
        num_steps=4,
        batch_size=2,
    )


def test_images_equal_those_of_diffusers(nano_config, latents, images):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        nano_config.parent / "model", safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS,
        negative_prompt=["bad"] * 3,
        latents=torch.from_numpy(np.load(latents)),
        num_inference_steps=4,
        guidance_scale=5.0,
        output_type="np",
    ).images
    assert images.shape == (3, 8, 8, 3) and images.dtype == np.float32
    np.testing.assert_allclose(images, expected, atol=2e-4)
    assert images.std() > 0.05


def test_noise_follows_from_seed_and_place():
    keys = make_image_keys(0, 5)
    data = np.asarray(jax.random.key_data(keys))
    assert data.shape[:2] == (2, 5)
    assert len(np.unique(data.reshape(10, -1), axis=0)) == 10
    np.testing.assert_array_equal(data[:, :2], jax.random.key_data(make_image_keys(0, 2)))
    assert not np.array_equal(data, jax.random.key_data(make_image_keys(1, 5)))


def test_latents_are_turned_to_channels_last(tmp_path):
    values = np.arange(2 * 4 * 3 * 5, dtype=np.float32).reshape(2, 4, 3, 5)
    np.save(tmp_path / "x.npy", values)
    read = read_latents(tmp_path / "x.npy", 2, (3, 5, 4))
    assert read[1, 2, 4, 3] == values[1, 3, 2, 4]


def test_latents_that_do_not_fit(tmp_path, latents):
    with pytest.raises(UserError, match=r"shape \(3, 4, 8, 8\); 2 prompts .* need \(2, 4, 8, 8\)"):
        read_latents(latents, 2, (8, 8, 4))
    with pytest.raises(UserError, match="absent.npy' cannot be read"):
        read_latents(tmp_path / "absent.npy", 1, (8, 8, 4))
    (tmp_path / "text.npy").write_text("text")
    with pytest.raises(UserError, match="text.npy' cannot be read"):
        read_latents(tmp_path / "text.npy", 1, (8, 8, 4))


def test_output_is_an_array_or_pictures(tmp_path, images):
    write_output(tmp_path / "a" / "images.npy", images, PROMPTS)
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "images.npy"), images)
    write_output(tmp_path / "b", images, PROMPTS)
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert names == ["0000_a_cat.png", "0001_a_dog_on_a_boat.png", "0002_a_fox.png"]
    picture = np.asarray(Image.open(tmp_path / "b" / names[1]))
    np.testing.assert_allclose(picture / 255.0, images[1], atol=0.5 / 255 + 1e-6)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_output(tmp_path / "file" / "b", images, PROMPTS)


def test_the_program_samples_what_the_function_does(nano_config, latents, images, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    flags = {
        "model": nano_config.parent / "model",
        "prompts": prompts,
        "latents": latents,
        "negative_prompt": "bad",
        "num_steps": 4,
        "batch_size": 2,
        "output": tmp_path / "out.npy",
    }
    command = [sys.executable, "-m", "alignprop_jax.sample"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    process = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"3 images in {tmp_path / 'out.npy'}\n"
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), images, atol=1e-6)

import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from alignprop_jax import sample as sample_module
from alignprop_jax.core.finite import require_finite
from alignprop_jax.errors import UserError
from alignprop_jax.sample import check_output, make_image_keys, read_latents, sample, write_output

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


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path, good: save_archive(path, good), "cannot be read as .npy"),
        (lambda path, good: path.write_bytes(b"PK\3\4 no archive"), "cannot be read as .npy"),
        (lambda path, good: path.write_bytes(b""), "cannot be read as .npy"),
        (lambda path, good: path.mkdir(), "cannot be read as .npy"),
        (lambda path, good: np.save(path, good.astype(object)), "cannot be read as .npy"),
        (lambda path, good: path.write_bytes(pickle.dumps(good)), "cannot be read as .npy"),
        (lambda path, good: np.save(path, good.astype(np.int32)), "of type int32; noise is of fl"),
        (lambda path, good: np.save(path, good.astype(np.complex64)), "of type complex64"),
        (lambda path, good: np.save(path, good > 0), "of type bool"),
        (lambda path, good: np.save(path, good.astype("S4")), "of type |S4"),
        (lambda path, good: np.save(path, np.where(good > 0, np.nan, good)), "NaN, infinite or"),
        (lambda path, good: np.save(path, good * np.inf), "NaN, infinite or beyond float32"),
        (lambda path, good: np.save(path, good.astype(np.float64) + 1e300), "beyond float32"),
        (lambda path, good: np.save(path, good[0]), r"have shape \(4, 8, 8\)"),
        (lambda path, good: np.save(path, np.float32(1)), r"have shape \(\)"),
        (lambda path, good: write_header(path, "(1, 4, 8, 8)"), "cannot be read as .npy"),
        (lambda path, good: write_header(path, "(1 << 40, 4, 8, 8)"), "cannot be read as .npy"),
        (lambda path, good: write_header(path, "(999999999999, 4)"), "cannot be read as .npy"),
        (lambda path, good: write_header(path, "(-1,)"), "cannot be read as .npy"),
        (lambda path, good: write_header(path, "(" * 900), "cannot be read as .npy"),
    ],
)
def test_latents_that_are_none(tmp_path, write, message):
    good = np.ones((1, 4, 8, 8), np.float32)
    write(tmp_path / "x.npy", good)
    with pytest.raises(UserError, match=f"^latents '.*x.npy' .*{message}"):
        read_latents(tmp_path / "x.npy", 1, (8, 8, 4))


def save_archive(path, good):
    with path.open("wb") as file:
        np.savez(file, good)


def write_header(path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def test_half_and_double_precision_is_noise_too(tmp_path):
    good = np.random.default_rng(0).standard_normal((1, 4, 8, 8))
    for dtype in (np.float16, np.float64, ">f4"):
        np.save(tmp_path / "x.npy", good.astype(dtype))
        np.testing.assert_allclose(
            read_latents(tmp_path / "x.npy", 1, (8, 8, 4)), good.transpose(0, 2, 3, 1), atol=2e-3
        )


def test_a_sample_that_is_not_finite_is_an_error(nano_config, monkeypatch):
    """A decoder whose bias is NaN, as weights that overflow are."""
    load = sample_module.load_generator

    def load_overflown(model, **options):
        loaded = load(model, **options)
        loaded.params["vae"]["decoder"]["conv_out"]["bias"] *= np.nan
        return loaded

    monkeypatch.setattr(sample_module, "load_generator", load_overflown)
    with pytest.raises(UserError, match='of 2 samples 2 are NaN or infinite: "a cat", "a dog on'):
        sample(str(nano_config.parent / "model"), PROMPTS, num_steps=2, batch_size=2)


def test_only_so_many_prompts_are_named():
    images = np.full((6, 2, 2, 3), np.nan)
    images[4] = 0.5
    with pytest.raises(UserError, match='of 6 samples 5 .*: "0", "1", "2" and 2 more. Either the'):
        require_finite(images, list("012345"))
    require_finite(images[4:5], ["4"])


def test_an_output_that_cannot_be_written_is_found_before_sampling(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.npy").mkdir()
    for output in (
        "file",
        "file/images",
        "file/x.npy",
        "folder.npy",
        "/dev/null/x",
        "/proc/x",
        "/proc",
    ):
        with pytest.raises(UserError, match=f"output '.*{output}' cannot be written "):
            check_output(tmp_path / output)
    check_output(tmp_path / "new/x.npy")
    check_output(tmp_path / "new/images")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["images"]


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

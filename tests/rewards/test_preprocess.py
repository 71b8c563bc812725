"""Preprocessing against PyTorch's resize and transformers' image processor."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.rewards.preprocess import (
    CLIPPreprocessor,
    OwlPreprocessor,
    crop_middle,
    resize_shorter_edge,
)

CONFIG = {
    "size": {"shortest_edge": 24},
    "crop_size": {"height": 24, "width": 24},
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "resample": 3,
}


def write_config(folder, **changes):
    (folder / "preprocessor_config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


@pytest.mark.parametrize("source", [64, 33, 17])
def test_resize_and_its_gradient_are_pytorchs(source):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(2, source, source + 5, 3)).astype(np.float32)
    width = 24 * (source + 5) // source
    weights = rng.normal(size=(2, 24, width, 3)).astype(np.float32)

    reference = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    resized = torch.nn.functional.interpolate(
        reference, (24, width), mode="bicubic", antialias=True, align_corners=False
    )
    (resized * torch.tensor(weights.transpose(0, 3, 1, 2))).sum().backward()

    actual = resize_shorter_edge(jnp.asarray(images), 24)
    np.testing.assert_allclose(
        actual, resized.detach().numpy().transpose(0, 2, 3, 1), rtol=0, atol=2e-6
    )
    gradient = jax.grad(lambda x: (resize_shorter_edge(x, 24) * weights).sum())(images)
    np.testing.assert_allclose(
        gradient, reference.grad.numpy().transpose(0, 2, 3, 1), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("height, width", [(24, 24), (50, 40), (31, 64)])
def test_agrees_with_transformers_but_for_its_rounding(tmp_path, height, width):
    transformers = pytest.importorskip("transformers")
    # Away from 0 and 1, which 8 bits clip at.
    pixels = np.random.default_rng(1).integers(60, 196, size=(height, width, 3), dtype=np.uint8)
    processor = transformers.CLIPImageProcessorPil(**CONFIG)
    expected = processor(pixels, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)

    preprocess = CLIPPreprocessor.from_folder(write_config(tmp_path), 24)
    actual = preprocess(jnp.asarray(pixels[None], jnp.float32) / 255)
    assert actual.shape == (1, 24, 24, 3)
    # PIL rounds to a level after each axis: at most one level of 255, in units of the smallest std.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1 / 255 / 0.26)


def test_size_may_be_a_number(tmp_path):
    plain = CLIPPreprocessor.from_folder(write_config(tmp_path, size=24, crop_size=24), 24)
    assert plain == CLIPPreprocessor.from_folder(write_config(tmp_path), 24)


def test_crop_of_an_odd_rest():
    image = jnp.arange(5.0).reshape(1, 1, 5, 1) + jnp.zeros((1, 2, 5, 1))
    assert crop_middle(image, 2)[0, 0, :, 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resample": 2}, "resample=2"),
        (
            {"crop_size": 20},
            "crop_size=20 is not supported; it must be image_size=24, which config",
        ),
        ({"size": 48, "crop_size": 48}, "size=48 is not supported; it must be image_size=24"),
        ({"size": {"height": 3, "width": 4}}, "must be square"),
        ({"image_mean": None}, "image_mean=null is not supported"),
        ({"image_std": [0.2, 0, 0.2]}, "image_std=.*each a number from 0.001"),
        ({"do_normalize": False}, "do_normalize=false"),
        ({"rescale_factor": 1}, "rescale_factor=1 "),
    ],
)
def test_unsupported_config(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        CLIPPreprocessor.from_folder(write_config(tmp_path, **changes), 24)


OWL_CONFIG = {**CONFIG, "size": {"height": 24, "width": 24}, "do_center_crop": False}


@pytest.mark.parametrize("height, width", [(24, 24), (50, 40), (20, 16)])
def test_stretches_as_transformers_for_owlvit(tmp_path, height, width):
    transformers = pytest.importorskip("transformers")
    pixels = np.random.default_rng(1).integers(60, 196, size=(height, width, 3), dtype=np.uint8)
    processor = transformers.OwlViTImageProcessorPil(**OWL_CONFIG)
    expected = processor(pixels, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    preprocess = OwlPreprocessor.from_folder(write_config(tmp_path, **OWL_CONFIG), 24, pads=False)
    actual = preprocess(jnp.asarray(pixels[None], jnp.float32) / 255)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1 / 255 / 0.26)


@pytest.mark.parametrize("height, width", [(24, 24), (16, 16), (12, 20)])
def test_pads_as_transformers_for_owlv2(tmp_path, height, width):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    pixels = np.random.default_rng(1).integers(60, 196, size=(height, width, 3), dtype=np.uint8)
    config = {**OWL_CONFIG, "resample": 2}
    processor = transformers.Owlv2ImageProcessorPil(**config)
    expected = processor(pixels, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    preprocess = OwlPreprocessor.from_folder(write_config(tmp_path, **config), 24, pads=True)
    actual = preprocess(jnp.asarray(pixels[None], jnp.float32) / 255)
    # Transformers mirrors the picture at its edge, where we extend it.
    inner = (slice(None), slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(actual[inner], expected[inner], rtol=0, atol=1e-5)


def test_detectors_that_crop_are_refused(tmp_path):
    folder = write_config(tmp_path, **{**OWL_CONFIG, "do_center_crop": True})
    with pytest.raises(UserError, match="do_center_crop=true"):
        OwlPreprocessor.from_folder(folder, 24, pads=False)


def test_missing_config(tmp_path):
    with pytest.raises(UserError, match="preprocessor_config.json: no such file"):
        CLIPPreprocessor.from_folder(tmp_path, 24)

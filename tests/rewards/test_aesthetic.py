"""The aesthetic reward against transformers' CLIP and PyTorch's linear layers."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.loading.tensor_files import read_safetensors, write_safetensors
from alignprop_jax.rewards import check_reward, make_reward
from alignprop_jax.rewards.aesthetic import LAION_HEAD, apply_head, load_head
from tests.torch_pipeline import torch, transformers

WIDTHS = [12, 10, 8, 6, 4, 1]
NUMBERS = [0, 2, 4, 6, 7]  # the others are dropout layers in LAION's file


def head_tensors(widths=WIDTHS, numbers=NUMBERS):
    rng = np.random.default_rng(0)
    tensors = {}
    for number, (size_in, size_out) in zip(numbers, itertools.pairwise(widths), strict=True):
        tensors[f"layers.{number}.weight"] = rng.normal(size=(size_out, size_in))
        tensors[f"layers.{number}.bias"] = rng.normal(size=size_out)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def write_clip(folder, vision, image_size, projection_dim):
    """A CLIP of transformers with random weights."""
    torch.manual_seed(0)
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 20,
        "max_position_embeddings": 8,
    }
    vision = {**vision, "image_size": image_size}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=projection_dim
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    processor = {
        "size": image_size,
        "crop_size": image_size,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP folder with random weights, and a head beside it."""
    root = tmp_path_factory.mktemp("models")
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 8,
    }
    write_clip(root / "clip", vision, 16, WIDTHS[0])
    write_safetensors(head_tensors(), root / "aesthetic_head.safetensors")
    return root


def make_aesthetic(clip, head=""):
    return make_reward("aesthetic", None, {"aesthetic": {"clip": str(clip), "head": str(head)}})


@pytest.fixture(scope="module")
def reward(folder):
    return make_aesthetic(folder / "clip")


def assert_parity(reward, clip_folder, head, image_size):
    """With the head's tensors by name, in PyTorch."""
    shape = (3, 2 * image_size, 2 * image_size, 3)
    images = np.random.default_rng(1).uniform(size=shape).astype(np.float32)
    clip = transformers.CLIPModel.from_pretrained(clip_folder)
    pixels = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    resized = torch.nn.functional.interpolate(
        pixels, (image_size, image_size), mode="bicubic", antialias=True
    )
    pooled = clip.vision_model((resized - mean) / std).pooler_output
    x = torch.nn.functional.normalize(clip.visual_projection(pooled), dim=-1)
    for n in NUMBERS:
        weight, bias = (torch.tensor(head[f"layers.{n}.{leaf}"]) for leaf in ("weight", "bias"))
        x = torch.nn.functional.linear(x, weight, bias)
    x.sum().backward()

    inputs = reward.prepare(["a cat"] * 3)
    # Weights as an argument of the compiled program, as in training.
    score = jax.jit(reward.score)(reward.params, images, inputs)
    np.testing.assert_allclose(score, x.detach().numpy()[:, 0], rtol=1e-4, atol=1e-4)
    gradient = jax.jit(jax.grad(lambda im, p: reward.score(p, im, inputs).sum()))(
        images, reward.params
    )
    expected = pixels.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_score_and_gradient_are_pytorchs(folder, reward):
    assert_parity(reward, folder / "clip", head_tensors(), 16)


@pytest.mark.full_size
def test_laions_predictor_on_vit_l_14_is_pytorchs(tmp_path):
    """The weights of CLIP are random, the head is the real one."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
    write_clip(tmp_path / "clip", vision, 224, 768)
    reward = make_aesthetic(tmp_path / "clip")
    assert_parity(reward, tmp_path / "clip", dict(read_safetensors(LAION_HEAD)), 224)


def test_laions_head_is_for_any_clip_without_its_own(folder, tmp_path):
    shutil.copytree(folder / "clip", tmp_path / "clip")
    message = (
        "aesthetic_head_vit_l_14.safetensors: takes embeddings of 768, the CLIP in .* gives 12"
    )
    with pytest.raises(UserError, match=message):
        make_aesthetic(tmp_path / "clip")
    # A score of 5.5 or so: LAION's raters gave 1 to 10.
    embedding = np.random.default_rng(0).standard_normal((64, 768)).astype(np.float32)
    assert 3 < float(apply_head(load_head(LAION_HEAD), embedding).mean()) < 7


def test_needs_no_text_tower(reward):
    assert set(reward.params["clip"]) == {"vision_model", "visual_projection", "logit_scale"}
    check_reward(reward, (32, 32, 3))


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "has no tensors, so it is no head"),
        (head_tensors([12, 3], [0]), "last layer must give one number, the score, not 3"),
        (
            {**head_tensors(), "layers.8.weight": np.zeros((1, 1), np.float32)},
            "layers.8 needs both",
        ),
        ({**head_tensors(), "scale": np.zeros(1, np.float32)}, "tensor scale is not named"),
        ({**head_tensors(), "layers.2.bias": np.zeros(3, np.float32)}, "layers.2 has a weight"),
    ],
)
def test_head_of_another_shape(tmp_path, tensors, message):
    write_safetensors(tensors, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match=message):
        load_head(tmp_path / "head.safetensors")


def test_head_for_another_clip(tmp_path, folder):
    write_safetensors(head_tensors([7, 1], [0]), tmp_path / "head.safetensors")
    with pytest.raises(UserError, match="takes embeddings of 7, the CLIP in .* gives 12"):
        make_aesthetic(folder / "clip", tmp_path / "head.safetensors")


def test_head_is_read_in_the_order_of_its_numbers(tmp_path):
    tensors = head_tensors([4, 3, 2, 1], [2, 9, 10])
    write_safetensors(tensors, tmp_path / "head.safetensors")
    layers = load_head(tmp_path / "head.safetensors")
    np.testing.assert_array_equal(layers[2]["kernel"], tensors["layers.10.weight"].T)
    assert [layer["kernel"].shape for layer in layers] == [(4, 3), (3, 2), (2, 1)]
    assert all(layer["kernel"].dtype == jnp.float32 for layer in layers)

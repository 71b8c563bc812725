"""The aesthetic reward against transformers' CLIP and PyTorch's linear layers."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.rewards import check_reward, make_reward
from alignprop_jax.rewards.aesthetic import load_head
from alignprop_jax.weights import write_safetensors

WIDTHS = [12, 10, 8, 6, 4, 1]
NUMBERS = [0, 2, 4, 6, 7]  # the others are dropout layers in LAION's file


def head_tensors(widths=WIDTHS, numbers=NUMBERS):
    rng = np.random.default_rng(0)
    tensors = {}
    for number, (size_in, size_out) in zip(numbers, itertools.pairwise(widths), strict=True):
        tensors[f"layers.{number}.weight"] = rng.normal(size=(size_out, size_in))
        tensors[f"layers.{number}.bias"] = rng.normal(size=size_out)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP folder with random weights, and a head beside it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 20, "max_position_embeddings": 8},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=WIDTHS[0],
    )
    root = tmp_path_factory.mktemp("models")
    transformers.CLIPModel(config).save_pretrained(root / "clip")
    processor = {
        "size": 16,
        "crop_size": 16,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps(processor))
    write_safetensors(head_tensors(), root / "aesthetic_head.safetensors")
    return root


@pytest.fixture(scope="module")
def reward(folder):
    options = {"aesthetic": {"clip": str(folder / "clip"), "head": ""}}
    return make_reward("aesthetic", tokenizer=None, options=options)


def test_score_and_gradient_are_pytorchs(folder, reward):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    images = np.random.default_rng(1).uniform(size=(3, 32, 32, 3)).astype(np.float32)

    clip = transformers.CLIPModel.from_pretrained(folder / "clip")
    pixels = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    resized = torch.nn.functional.interpolate(pixels, (16, 16), mode="bicubic", antialias=True)
    pooled = clip.vision_model((resized - mean) / std).pooler_output
    x = torch.nn.functional.normalize(clip.visual_projection(pooled), dim=-1)
    tensors = {name: torch.tensor(value) for name, value in head_tensors().items()}
    for n in NUMBERS:
        x = torch.nn.functional.linear(
            x, tensors[f"layers.{n}.weight"], tensors[f"layers.{n}.bias"]
        )
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


def test_needs_no_text_tower(reward):
    assert set(reward.params["clip"]) == {"vision_model", "visual_projection", "logit_scale"}
    check_reward(reward, (32, 32, 3))


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "last layer must give one number"),
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
    options = {"clip": str(folder / "clip"), "head": str(tmp_path / "head.safetensors")}
    with pytest.raises(UserError, match="takes embeddings of 7, the CLIP in .* gives 12"):
        make_reward("aesthetic", tokenizer=None, options={"aesthetic": options})


def test_head_is_read_in_the_order_of_its_numbers(tmp_path):
    tensors = head_tensors([4, 3, 2, 1], [2, 9, 10])
    write_safetensors(tensors, tmp_path / "head.safetensors")
    layers = load_head(tmp_path / "head.safetensors")
    np.testing.assert_array_equal(layers[2]["kernel"], tensors["layers.10.weight"].T)
    assert [layer["kernel"].shape for layer in layers] == [(4, 3), (3, 2), (2, 1)]
    assert all(layer["kernel"].dtype == jnp.float32 for layer in layers)

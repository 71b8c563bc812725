"""Agreement with the prompt, against transformers' CLIP, image processing included."""

import json
import shutil

import jax
import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.loading.pretrained import resolve_model
from alignprop_jax.rewards import check_reward, make_reward
from tests.torch_pipeline import torch

transformers = pytest.importorskip("transformers")

PROMPTS = ["a cat", "two dogs", "a red cat and a blue dog", "a cat"]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP folder with random weights and the tokenizer of the model in the package."""
    torch.manual_seed(0)
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    tokenizer = resolve_model("emoji") / "tokenizer"
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    config = transformers.CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 16,
            "eos_token_id": vocabulary["<|endoftext|>"],
        },
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPModel(config).save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    processor = {"size": 16, "crop_size": 16, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def make(name, folder):
    return make_reward(name, None, {name: {"clip": str(folder)}})


@pytest.mark.parametrize("name", ["clip_score", "pickscore"])
def test_score_and_gradient_are_transformers(folder, name):
    images = np.random.default_rng(1).uniform(size=(4, 32, 32, 3)).astype(np.float32)
    clip = transformers.CLIPModel.from_pretrained(folder)
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", max_length=16, return_tensors="pt"
    )
    pixels = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (MEAN, STD))
    resized = torch.nn.functional.interpolate(pixels, (16, 16), mode="bicubic", antialias=True)
    output = clip(input_ids=tokens.input_ids, pixel_values=(resized - mean) / std)
    expected = output.logits_per_image.diagonal()
    if name == "clip_score":
        expected = expected / clip.logit_scale.exp()
    expected.sum().backward()

    reward = make(name, folder)
    inputs = reward.prepare(PROMPTS)
    score = jax.jit(reward.score)(reward.params, images, inputs)
    np.testing.assert_allclose(score, expected.detach().numpy(), atol=1e-4)
    assert np.ptp(score) > 0.01
    gradient = jax.jit(jax.grad(lambda x: reward.score(reward.params, x, inputs).sum()))(images)
    np.testing.assert_allclose(
        gradient,
        pixels.grad.numpy().transpose(0, 2, 3, 1),
        atol=1e-4 * np.abs(pixels.grad.numpy()).max(),
    )


def test_compiled_step_holds_no_text_tower(folder):
    reward = make("clip_score", folder)
    assert set(reward.params) == {"vision_model", "visual_projection", "logit_scale"}
    check_reward(reward, (32, 32, 3))


def test_the_clip_in_the_package_tells_captions_apart():
    """Its embeddings of "a cat" and "a dog" differ; the same prompt is embedded the same."""
    inputs = make_reward("clip_score", None).prepare(["a cat", "a dog", "a cat"])
    np.testing.assert_allclose((inputs**2).sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(inputs[0], inputs[2])
    assert inputs[0] @ inputs[1] < 0.95


def test_a_clip_without_tokenizer_is_refused(folder, tmp_path):
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(UserError, match="no CLIP tokenizer in"):
        make("clip_score", tmp_path)

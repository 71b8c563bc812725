"""HPS against open_clip."""

import jax
import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.loading.open_clip import load_open_clip
from alignprop_jax.loading.pretrained import resolve_tokenizer
from alignprop_jax.loading.tensor_files import write_safetensors
from alignprop_jax.loading.tokenizer import load_tokenizer, tokenize
from alignprop_jax.rewards import make_reward
from alignprop_jax.rewards.clip_similarity import clip_similarity
from alignprop_jax.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, CLIPPreprocessor
from tests.open_clip_reference import open_clip
from tests.torch_pipeline import torch

PROMPTS = ["a cat", "two dogs", "a red cat and a blue dog"]
HEADS = 4
SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 8, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 4, "layers": 2},
}
VIT_H = {
    "embed_dim": 1024,
    "vision_cfg": {
        "image_size": 224,
        "layers": 32,
        "width": 1280,
        "head_width": 80,
        "patch_size": 14,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 1024,
        "heads": 16,
        "layers": 24,
    },
}


def make_reference(config):
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 and name != "logit_scale":
            torch.nn.init.normal_(parameter, mean=float("weight" in name), std=0.3)
    return model


def reference_tokens(config):
    """CLIP's ids: start, words, end, then zeros, which is how open_clip fills up."""
    rng = np.random.default_rng(0)
    ids = np.zeros((3, config["text_cfg"]["context_length"]), np.int64)
    for row, length in enumerate((3, 4, 9)):
        ids[row, 0], ids[row, length] = 49406, 49407
        ids[row, 1:length] = rng.integers(0, 49406, length - 1)
    return ids


def assert_parity(reference, config, heads, path):
    images = np.random.default_rng(1).uniform(size=(3, 40, 40, 3)).astype(np.float32)
    size = config["vision_cfg"]["image_size"]
    ids = reference_tokens(config)
    pixels = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (OPENAI_MEAN, OPENAI_STD))
    resized = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    image = reference.encode_image((resized - mean) / std, normalize=True)
    text = reference.encode_text(torch.tensor(ids), normalize=True)
    expected = (image * text).sum(-1)
    expected.sum().backward()
    gradient, expected = pixels.grad.numpy().transpose(0, 2, 3, 1), expected.detach().numpy()
    del reference

    model, params = load_open_clip(path, heads, heads)
    preprocess = CLIPPreprocessor(size, OPENAI_MEAN, OPENAI_STD)
    # Padded with the end of text, as transformers' tokenizer does; nothing after it counts.
    padded = np.where(np.cumsum(ids == 49407, axis=1) > 0, 49407, ids).astype(np.int32)
    reward = clip_similarity("hps", model, params, preprocess, lambda _: padded, lambda _: 1.0)
    del params
    inputs = reward.prepare(PROMPTS)

    @jax.jit
    def score(params, images):
        values = reward.score(params, images, inputs)
        return values.sum(), values

    (_, actual), actual_gradient = jax.jit(jax.value_and_grad(score, argnums=1, has_aux=True))(
        reward.params, images
    )
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    np.testing.assert_allclose(actual_gradient, gradient, atol=1e-4 * np.abs(gradient).max())
    assert np.ptp(expected) > 1e-3


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_score_and_gradient_are_open_clips(tmp_path, suffix):
    reference, path = make_reference(SMALL), tmp_path / f"model.{suffix}"
    state = reference.state_dict()
    if suffix == "pt":
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        write_safetensors({name: tensor.numpy() for name, tensor in state.items()}, path)
    assert_parity(reference, SMALL, HEADS, path)


@pytest.mark.full_size
def test_score_and_gradient_are_open_clips_at_the_size_of_vit_h(tmp_path):
    path = tmp_path / "model.pt"
    reference = make_reference(VIT_H)
    torch.save({"state_dict": reference.state_dict()}, path)
    assert_parity(reference, VIT_H, 16, path)


def test_another_model_is_refused(tmp_path):
    state = {name: tensor.numpy() for name, tensor in make_reference(SMALL).state_dict().items()}
    path = tmp_path / "model.safetensors"
    write_safetensors({name: state[name] for name in state if name != "visual.proj"}, path)
    with pytest.raises(UserError, match="no CLIP in OpenCLIP's layout; it lacks .*projection"):
        load_open_clip(path, HEADS, HEADS)
    write_safetensors({**state, "visual.proj_2": np.zeros((2, 3), np.float32)}, path)
    with pytest.raises(UserError, match=r"has no place for tensor visual.proj_2 \[2, 3\]"):
        load_open_clip(path, HEADS, HEADS)


def test_a_checkpoint_that_is_nowhere(tmp_path):
    options = {"checkpoint": str(tmp_path / "HPS.pt"), "tokenizer": "emoji"}
    with pytest.raises(UserError, match=r"HPS.pt: no such file; give one, or OWNER/NAME/FILE"):
        make_reward("hps", None, {"hps": options})


def test_tokenizer_within_a_pipeline_is_found():
    folder = resolve_tokenizer("emoji")
    assert folder.name == "tokenizer"
    assert tokenize(load_tokenizer(folder), ["a cat"]).shape == (1, 16)

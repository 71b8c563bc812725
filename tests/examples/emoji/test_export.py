"""The model folder: what is written loads elsewhere, and gives the same images there."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from alignprop_jax.generators.stable_diffusion.generator import encode_prompts
from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.generators.stable_diffusion.unet import UNet, UNetConfig
from alignprop_jax.loading.pretrained import abstract_params, load_component
from alignprop_jax.loading.tokenizer import load_tokenizer, tokenize
from alignprop_jax.nn.clip import CLIPConfig, CLIPModel
from alignprop_jax.nn.vae import AutoencoderKL, VAEConfig
from alignprop_jax.rewards.preprocess import CLIPPreprocessor
from examples.emoji import export
from examples.emoji.captions import caption_words
from examples.emoji.tokenizer import build_tokenizer
from tests.chains import make_sample

WEIGHTS = {
    "clip": "model.safetensors",
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
# Compiling is most of the time, and the arithmetic is the same.
QUICK_COMPILATION = {"xla_backend_optimization_level": 0}
PROMPTS = ["a cat", "two red dogs on a blue background"]


def random_params(module, seed):
    """Of an order that keeps activations near one, with norms and biases that matter."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        match path[-1].key:
            case "kernel":
                return noise / np.sqrt(np.prod(leaf.shape[:-1]))
            case "scale":
                return 1 + 0.2 * noise
            case "logit_scale":
                return np.array(2.0)
            case _:
                return 0.2 * noise

    return jax.tree_util.tree_map_with_path(draw, abstract_params(module))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole model of the smallest widths, written by the package."""
    folder = tmp_path_factory.mktemp("model")
    build_tokenizer(caption_words(), folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    clip_settings = {"width": 16, "text_layers": 1, "vision_layers": 2, "num_heads": 2}
    clip = export.clip_config(ConfigDict({**clip_settings, "patch_size": 32}), tokenizer)
    clip_model = CLIPModel(CLIPConfig.from_dict(clip))
    export.write_clip(folder, clip, random_params(clip_model, 0))

    vae = export.vae_config(ConfigDict({"channels": (8, 8, 16, 16), "latent_channels": 4}))
    vae["scaling_factor"] = 0.7
    vae_model = AutoencoderKL(VAEConfig.from_dict(vae))
    export.write_model(folder / "vae", vae, random_params(vae_model, 1), WEIGHTS["vae"])

    settings = ConfigDict({"channels": (16, 32), "num_heads": (1, 2)})
    unet = export.unet_config(settings, vae_model.config, clip_model.config.text)
    unet_model = UNet(UNetConfig.from_dict(unet))
    export.write_model(folder / "unet", unet, random_params(unet_model, 2), WEIGHTS["unet"])
    export.write_pipeline_index(folder)
    return folder


def test_weights_are_stored_in_half_precision(folder):
    for component, name in WEIGHTS.items():
        tensors = load_file(folder / component / name)
        assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float16)}
        assert json.loads((folder / component / "config.json").read_text())
    clip = load_file(folder / "clip" / WEIGHTS["clip"])
    text_encoder = load_file(folder / "text_encoder" / WEIGHTS["text_encoder"])
    assert {name for name in clip if name.startswith("text_model.")} == set(text_encoder)
    for name, tensor in text_encoder.items():
        np.testing.assert_array_equal(tensor, clip[name])


def test_images_are_those_of_diffusers(folder):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    sd, params, (tokenizer,) = load_stable_diffusion(folder)
    assert sd.latent_shape == (8, 8, 4)
    latents = np.random.default_rng(0).normal(size=(2, *sd.latent_shape)).astype(np.float32)
    expected = pipeline(
        PROMPTS,
        latents=torch.from_numpy(latents.transpose(0, 3, 1, 2)),
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="np",
    ).images

    # Two programs compile faster than one that holds them both.
    encode = jax.jit(
        lambda ids: encode_prompts(sd, params, [ids]), compiler_options=QUICK_COMPILATION
    )
    context = encode(tokenize(tokenizer, [*PROMPTS, ""]))
    sample = jax.jit(
        make_sample(sd, num_steps=3, guidance_scale=4.0), compiler_options=QUICK_COMPILATION
    )
    images = sample(params, None, latents, context[:2], context[2:], jax.random.key(0))
    assert images.shape == (2, 64, 64, 3)
    assert np.asarray(images).std() > 0.05
    assert np.abs(images[0] - images[1]).max() > 0.05
    np.testing.assert_allclose(images, expected, atol=1e-3)


def test_clip_is_that_of_transformers(folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peer = transformers.CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32)
    # The Pillow variant, which needs no torchvision.
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder / "clip")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    pixel_values = processor(list(pictures), return_tensors="np")["pixel_values"]
    tokens = tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        expected = peer(tokens.input_ids, torch.from_numpy(pixel_values)).logits_per_image.numpy()

    preprocess = CLIPPreprocessor.from_folder(folder / "clip", 64)
    ours = preprocess(jnp.asarray(pictures / 255, jnp.float32))
    np.testing.assert_allclose(ours, pixel_values.transpose(0, 2, 3, 1), atol=1e-5)
    # Training makes pixel values without the preprocessor.
    np.testing.assert_allclose(ours, pictures / 127.5 - 1, atol=1e-5)
    model, params = load_component(CLIPModel, folder / "clip")
    apply = jax.jit(model.apply, compiler_options=QUICK_COMPILATION)
    logits = apply({"params": params}, tokens.input_ids.numpy(), ours)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-4)

"""Our LoRA files in the releases of diffusers and PEFT that people still run, and in ComfyUI.

Each release has an environment of its own, made once in the cache: its packages stand before those
of this environment on the path, and PyTorch is shared.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.generators.stable_diffusion.prompts import encode
from alignprop_jax.generators.stable_diffusion.unet import UNet, UNetConfig
from alignprop_jax.loading.pretrained import abstract_params
from alignprop_jax.loading.tokenizer import tokenize
from alignprop_jax.loading.weights import to_torch_layout
from alignprop_jax.lora.factors import init_lora, layer_shapes, scale_lora
from alignprop_jax.lora.files import LORA_FILE, save_lora
from alignprop_jax.lora.kohya import KOHYA_FILE, save_kohya_lora
from alignprop_jax.nn.clip import CLIPTextConfig, CLIPTextModel
from tests import torch_pipeline
from tests.chains import make_sample
from tests.loading import ldm_checkpoint
from tests.parity import QUICK_COMPILATION
from tests.random_lora import randomize_lora

pytest.importorskip("peft")

PROMPTS, RANK, ALPHA = ["a cat", "two dogs"], 3, 5.0
RELEASES = {
    "0.31": ("diffusers==0.31.0", "peft==0.13.2", "transformers==4.46.3", "tokenizers==0.20.3")
    + ("huggingface_hub==0.26.5", "accelerate==1.1.1"),
    "0.35": ("diffusers==0.35.2", "peft==0.17.1", "transformers==4.57.1", "tokenizers==0.22.1")
    + ("huggingface_hub==0.35.3", "accelerate==1.10.1"),
    # Of this environment, which is the newest that is tested.
    "installed": (),
}
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")
CONVOLUTIONS = ("conv1", "proj_in")
COMPLETE = "complete"


def environment(release):
    """The folder of a release's packages; skips the test where they cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "alignprop_jax" / "releases" / "-".join(RELEASES[release][:2])
    if not (folder / COMPLETE).exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        command += ["--target", str(folder), *RELEASES[release]]
        process = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if process.returncode:
            pytest.skip(f"pip cannot install {RELEASES[release][0]}: {process.stderr[-300:]}")
        (folder / COMPLETE).touch()
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with a model, its inputs and two LoRA files, factors, and our images with them."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = torch_pipeline.build_torch_pipeline(folder)
    sd, params, tokenizers = load_stable_diffusion(folder)
    targets = ("to_q", "to_k", "to_v", "to_out.0", *CONVOLUTIONS)
    lora = init_lora(jax.random.key(0), params["unet"], RANK, targets)
    lora = randomize_lora(lora, size=0.1)
    text = init_lora(jax.random.key(1), params["text_encoder"], 2, TEXT_TARGETS)
    text = {"text_encoder": randomize_lora(text, seed=1, size=0.1)}
    save_lora(folder / LORA_FILE, lora, ALPHA, {"base_model": "tiny"}, text)
    save_kohya_lora(folder / KOHYA_FILE, lora, ALPHA, params["unet"], "epsilon", None, text)
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    weights = pipeline.text_encoder.state_dict()
    np.savez(
        folder / "inputs.npz",
        latents=latents.transpose(0, 3, 1, 2),
        ids=tokenize(tokenizers[0], ["", *PROMPTS]).astype(np.int64),
        config=torch_pipeline.text_config().to_json_string(),
        **{
            f"text.text_model.{name.removeprefix('text_model.')}": tensor.numpy()
            for name, tensor in weights.items()
        },
    )
    encoded = encode(sd, params, tokenizers, ["", *PROMPTS], text)
    scaled = scale_lora(lora, ALPHA / RANK)
    sample = jax.jit(make_sample(sd, 3, 4.0), compiler_options=QUICK_COMPILATION)
    frozen = {"unet": params["unet"], "vae": params["vae"]}
    images = sample(frozen, scaled, latents, encoded[1:], encoded[:1], jax.random.key(0))
    return folder, layer_changes(scaled), images


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", [LORA_FILE, KOHYA_FILE])
def test_every_release_draws_the_same(drawn, tmp_path, release, name):
    folder, changes, images = drawn
    environ = dict(os.environ)
    if RELEASES[release]:
        environ["PYTHONPATH"] = str(environment(release))
    peer = Path(__file__).with_name("release_peer.py")
    output = tmp_path / "output.npz"
    arguments = [str(folder), str(folder / "inputs.npz"), str(folder / name), str(output)]
    command = [sys.executable, str(peer), *arguments]
    process = subprocess.run(
        command, capture_output=True, text=True, env=environ, cwd=tmp_path, timeout=600
    )
    assert process.returncode == 0, process.stderr
    theirs = dict(np.load(output))
    if RELEASES[release]:
        assert [f"diffusers=={theirs['versions'][0]}", f"peft=={theirs['versions'][1]}"] == list(
            RELEASES[release][:2]
        )
    np.testing.assert_allclose(images, theirs["images"], atol=1e-4)
    for loader in ("diffusers",) if name == KOHYA_FILE else ("diffusers", "peft"):
        found = {key for key in theirs if key.startswith(f"{loader}.")}
        assert found == {f"{loader}.{layer}" for layer in changes}
        for layer, change in changes.items():
            np.testing.assert_allclose(theirs[f"{loader}.{layer}"], change, atol=1e-5)


def comfyui_names(unet, text_encoders):
    """What ComfyUI's maps of keys call the layers of a model; values are our parts and names.

    Read as facts: a UNet's layer is `lora_unet_` and its name in the original code, or diffusers',
    with underscores. One of a text encoder's layers is `lora_te_text_model_encoder_layers_...`,
    with te1 and te2 for the two of an XL.
    """
    known = {}
    state, original = unet.state_dict(), ldm_checkpoint.to_ldm_unet(unet)
    for in_diffusers, name in zip(state, original, strict=True):
        for each in (in_diffusers, name):
            stem, _, leaf = each.rpartition(".")
            if leaf == "weight":
                layer = in_diffusers.removesuffix(".weight")
                known[f"lora_unet_{stem.replace('.', '_')}"] = ("unet", layer)
    numbers = ("",) if len(text_encoders) == 1 else ("1", "2")
    for number, (part, encoder) in zip(numbers, text_encoders.items(), strict=True):
        for name in encoder.state_dict():
            found = re.fullmatch(r"(?:text_model\.)?(encoder\.layers\..+)\.weight", name)
            if found:
                stem = f"text_model.{found[1]}"
                known[f"lora_te{number}_{stem.replace('.', '_')}"] = (part, stem)
    return known


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_comfyui_has_a_layer_for_every_tensor_and_the_same_change(tmp_path, family):
    peers = ldm_checkpoint.build_parts(family, 100, 16)
    unet_config = UNetConfig.from_dict(dict(peers["unet"].config))
    shapes = {"unet": abstract_params(UNet(unet_config))}
    encoders = {name: peers[name] for name in ("text_encoder", "text_encoder_2") if name in peers}
    for name, encoder in encoders.items():
        config = CLIPTextConfig.from_dict(encoder.config.to_dict())
        shapes[name] = abstract_params(CLIPTextModel(config))
    lora = init_lora(jax.random.key(0), shapes["unet"], RANK, tuple(layer_shapes(shapes["unet"])))
    lora = randomize_lora(lora)
    text = {
        name: randomize_lora(init_lora(jax.random.key(0), shapes[name], 2, TEXT_TARGETS))
        for name in encoders
    }
    save_kohya_lora(tmp_path / KOHYA_FILE, lora, ALPHA, shapes["unet"], "epsilon", None, text)

    known, tensors = comfyui_names(peers["unet"], encoders), load_file(tmp_path / KOHYA_FILE)
    ours = {("unet", name): x for name, x in layer_changes(scale_lora(lora, ALPHA / RANK)).items()}
    for part, tree in text.items():
        ours |= {(part, name): change for name, change in layer_changes(tree).items()}
    stems = {name.partition(".")[0] for name in tensors}
    assert {known[stem] for stem in stems} == ours.keys() and len(stems) == len(ours)
    assert any("conv" in stem for stem in stems)
    for stem in stems:
        # ComfyUI multiplies them flattened, and shapes the product as the weight.
        up, down = (tensors[f"{stem}.lora_{name}.weight"] for name in ("up", "down"))
        scale = tensors[f"{stem}.alpha"] / down.shape[0]
        change = scale * up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        expected = ours[known[stem]]
        np.testing.assert_allclose(change.reshape(expected.shape), expected, atol=1e-4)


def layer_changes(lora):
    """What the factors add to the weights of each layer, in PyTorch's layout."""
    factors = flatten_dict(lora)
    return {
        ".".join(keys[:-1]): to_torch_layout(("kernel",), leaf @ factors[*keys[:-1], "up"])
        for keys, leaf in factors.items()
        if keys[-1] == "down"
    }

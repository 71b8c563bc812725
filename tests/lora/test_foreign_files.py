"""LoRA files as other tools write them draw here what they draw in diffusers."""

import collections

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from alignprop_jax import errors
from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.generators.stable_diffusion.prompts import encode
from alignprop_jax.loading.ldm_names import original_unet_layers
from alignprop_jax.lora.factors import merge_lora
from alignprop_jax.lora.files import load_lora
from alignprop_jax.lora.mixing import LoraMix
from alignprop_jax.merge import merge
from alignprop_jax.sample import sample
from tests import torch_pipeline
from tests.chains import make_sample
from tests.parity import QUICK_COMPILATION
from tests.torch_pipeline import torch

peft = pytest.importorskip("peft")

PROMPTS, NUM_STEPS, GUIDANCE_SCALE = ["a cat", "two dogs"], 3, 4.0
BUILD = {
    "sd": torch_pipeline.build_torch_pipeline,
    "sdxl": torch_pipeline.build_torch_xl_pipeline,
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

Model = collections.namedtuple("Model", "kind folder pipeline params draw")


@pytest.fixture(scope="module", params=list(BUILD))
def model(request, tmp_path_factory):
    """A model, with one program of ours that draws with parameters of all of its parts."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = BUILD[request.param](folder)
    sd, params, tokenizers = load_stable_diffusion(folder)
    sampler = make_sample(sd, NUM_STEPS, GUIDANCE_SCALE)
    run = jax.jit(sampler, compiler_options=QUICK_COMPILATION)
    np.save(folder / "latents.npy", latents().transpose(0, 3, 1, 2))

    def draw(params):
        encoded = encode(sd, params, tokenizers, ["", *PROMPTS])
        frozen = {"unet": params["unet"], "vae": params["vae"]}
        return run(frozen, None, latents(), encoded[1:], encoded[:1], jax.random.key(0))

    return Model(request.param, folder, pipeline, params, draw)


def latents():
    return np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)


def layers_of(module, wanted=lambda name: True):
    """The shape of the weight of each linear layer and convolution of a PyTorch module, by name."""
    return {
        name: tuple(layer.weight.shape)
        for name, layer in module.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and wanted(name)
    }


def factor_pair(shape, rank=2, size=0.1):
    """A pair for a layer in the layouts of PyTorch."""
    rng = np.random.default_rng(sum(shape))
    fan_out, *inputs = shape
    down = size * rng.standard_normal((rank, *inputs), np.float32)
    up = size * rng.standard_normal((fan_out, rank, *(1 for _ in inputs[1:])), np.float32)
    return down, up


def ends(*names):
    return lambda name: name.endswith(names)


def in_attention(name):
    """What kohya's trainers adapt by default."""
    return ".attentions." in f".{name}"


def kohya(pipeline, wanted, original=False, text=True):
    """As kohya's trainers write, with the original code's names of blocks as for XL."""
    layers = layers_of(pipeline.unet, wanted)
    unet_names = original_unet_layers(layers_of(pipeline.unet)) if original else {}
    is_xl = hasattr(pipeline, "text_encoder_2")
    parts = {"lora_unet_": {unet_names.get(name, name): layers[name] for name in layers}}
    if text:
        name = "lora_te1_" if is_xl else "lora_te_"
        parts[name] = layers_of(pipeline.text_encoder)
    if text and is_xl:
        parts["lora_te2_"] = layers_of(pipeline.text_encoder_2, lambda name: "encoder" in name)
    tensors = {}
    for prefix, of_part in parts.items():
        for name, shape in of_part.items():
            # transformers 5 has no prefix here, kohya's files have one.
            is_text = prefix != "lora_unet_" and not name.startswith("text_model")
            stem = prefix + ("text_model." * is_text + name).replace(".", "_")
            down, up = factor_pair(shape)
            tensors[f"{stem}.lora_down.weight"] = down
            tensors[f"{stem}.lora_up.weight"] = up
            tensors[f"{stem}.alpha"] = np.array(1.5, np.float32)
    return tensors


def dotted(layers, prefix, down, up):
    """As diffusers and PEFT write: `down` and `up` are what follows a layer's name."""
    tensors = {}
    for name, shape in layers.items():
        pair = factor_pair(shape)
        tensors |= {
            f"{prefix}.{name}{end}.weight": x for end, x in zip((down, up), pair, strict=True)
        }
    return tensors


def text_layers(pipeline, wanted):
    """A text encoder's layers with the prefix that files had before transformers 5."""
    layers = layers_of(pipeline.text_encoder, wanted)
    return {f"text_model.{name.removeprefix('text_model.')}": x for name, x in layers.items()}


def old_attention_names(layers):
    """diffusers before 0.22."""
    return {
        name.replace("attn1", "attn1.processor")
        .replace("attn2", "attn2.processor")
        .replace("to_out.0", "to_out"): shape
        for name, shape in layers.items()
    }


def old_text_names(layers):
    old = dict(zip(TEXT_ATTENTION, ("to_q", "to_k", "to_v", "to_out"), strict=True))
    return {
        f"{name.rpartition('.')[0]}.{old[name.rpartition('.')[2]]}": x for name, x in layers.items()
    }


def all_old(pipeline):
    unet = old_attention_names(layers_of(pipeline.unet, ends(*ATTENTION)))
    text = old_text_names(text_layers(pipeline, ends(*TEXT_ATTENTION)))
    return dotted(unet, "unet", "_lora.down", "_lora.up") | dotted(
        text, "text_encoder", "_lora.down", "_lora.up"
    )


def newer_diffusers(pipeline):
    unet = layers_of(pipeline.unet, ends(*ATTENTION))
    text = text_layers(pipeline, ends(*TEXT_ATTENTION, "fc1", "fc2"))
    names = (".lora_linear_layer.down", ".lora_linear_layer.up")
    return dotted(unet, "unet", ".lora.down", ".lora.up") | dotted(text, "text_encoder", *names)


def with_convolutions(pipeline):
    unet = layers_of(pipeline.unet)
    return dotted(unet, "unet", ".lora_A", ".lora_B") | dotted(
        text_layers(pipeline, ends(*TEXT_ATTENTION)), "text_encoder", ".lora_A", ".lora_B"
    )


def named_adapter(pipeline):
    unet = layers_of(pipeline.unet, ends(*ATTENTION))
    return dotted(unet, "unet", ".lora_A.default_0", ".lora_B.default_0")


KINDS = {
    "kohya's default": lambda pipeline: kohya(pipeline, in_attention),
    "kohya's convolutions": lambda pipeline: kohya(pipeline, lambda name: True, text=False),
    "diffusers before 0.22": all_old,
    "diffusers before PEFT": newer_diffusers,
    "convolutions in diffusers' names": with_convolutions,
    "the name of an adapter": named_adapter,
}


KINDS_OF_XL = ("kohya's default", "convolutions in diffusers' names")


def their_images(pipeline, file, weight=1.0):
    # The name that diffusers gives to an adapter without one, and writes to some files.
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    pipeline.set_adapters("default_0", weight)
    images = pipeline(
        PROMPTS,
        latents=torch.from_numpy(latents().transpose(0, 3, 1, 2)),
        num_inference_steps=NUM_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        output_type="np",
    ).images
    pipeline.unload_lora_weights()
    return images


def assert_same_images(model, file):
    lora, _ = load_lora(file, model.params)
    merged = {part: merge_lora(model.params[part], tree) for part, tree in lora.items()}
    ours = model.draw(model.params | merged)
    assert np.abs(model.draw(model.params) - ours).mean() > 0.003
    np.testing.assert_allclose(ours, their_images(model.pipeline, file), atol=1e-4)
    return lora


@pytest.mark.parametrize("kind", KINDS)
def test_images_equal_those_of_diffusers(model, tmp_path, kind, capsys):
    if model.kind == "sdxl" and kind not in KINDS_OF_XL:
        pytest.skip("the text encoders of an XL are named as those of others")
    errors.note.cache_clear()
    tensors = KINDS[kind](model.pipeline)
    save_file(tensors, tmp_path / "other.safetensors")
    lora = assert_same_images(model, tmp_path / "other.safetensors")
    assert sum(x.size for x in jax.tree.leaves(lora)) == sum(
        x.size for x in tensors.values() if x.ndim
    )
    assert ("adapts text_encoder" in capsys.readouterr().out) == (len(lora) > 1)


def test_names_of_the_original_code(model, tmp_path):
    """As kohya's trainers write an XL's, convolutions and resampling included."""
    if model.kind != "sdxl":
        pytest.skip("files for Stable Diffusion 1 and 2 have diffusers' names")
    tensors = kohya(model.pipeline, lambda name: True, original=True)
    assert "lora_unet_input_blocks_2_0_op.lora_up.weight" in tensors
    assert "lora_unet_output_blocks_1_2_conv.lora_up.weight" in tensors
    save_file(tensors, tmp_path / "other.safetensors")
    assert_same_images(model, tmp_path / "other.safetensors")


def test_programs_apply_factors_of_convolutions_and_text_encoders(model, tmp_path):
    """Apart and at a share in `sample`, and folded in by `merge`."""
    file = tmp_path / "other.safetensors"
    save_file(with_convolutions(model.pipeline), file)
    expected = their_images(model.pipeline, file, weight=0.6)
    mix, latents = LoraMix((str(file),), 0.6), model.folder / "latents.npy"
    settings = {"latents": latents, "num_steps": NUM_STEPS, "guidance_scale": GUIDANCE_SCALE}
    images = sample(str(model.folder), PROMPTS, lora=mix, **settings)
    np.testing.assert_allclose(images, expected, atol=1e-4)
    merge(str(model.folder), mix, tmp_path / "merged")
    merged = sample(str(tmp_path / "merged"), PROMPTS, **settings)
    np.testing.assert_allclose(merged, expected, atol=1e-4)


def test_a_file_of_the_text_encoder_alone(model, tmp_path):
    layers = text_layers(model.pipeline, ends(*TEXT_ATTENTION))
    file = tmp_path / "other.safetensors"
    save_file(dotted(layers, "text_encoder", ".lora_A", ".lora_B"), file)
    lora = assert_same_images(model, file)
    assert lora["unet"] == {}
    with pytest.raises(UserError, match="adapts text_encoder, which this model does not have"):
        load_lora(file, {"unet": model.params["unet"]})

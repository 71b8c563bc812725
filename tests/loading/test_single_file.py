"""Checkpoints in one file: the tensors, configs and predictions are those of diffusers."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.torch import save_file

from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.generator import encode_prompts
from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion, open_model
from alignprop_jax.generators.stable_diffusion.unet import UNetConfig
from alignprop_jax.loading import hub
from alignprop_jax.processes.ddim import DDIMScheduler
from tests import torch_pipeline
from tests.loading import ldm_checkpoint
from tests.parity import QUICK_COMPILATION
from tests.torch_pipeline import diffusers, torch, transformers

FAMILIES = ("sd1", "sd2", "sdxl")
CLASSES = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    """A file, and the networks in it."""
    return request.param, *write_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return write_checkpoint("sd1", tmp_path_factory.mktemp("sd1_alone"))


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    return write_checkpoint("sd2", tmp_path_factory.mktemp("sd2_alone"))


def write_checkpoint(family, folder, name="model.safetensors"):
    parts = ldm_checkpoint.build_parts(family, torch_pipeline.VOCAB_SIZE, torch_pipeline.MAX_LENGTH)
    path = folder / name
    save_file(ldm_checkpoint.to_ldm(family, parts), path)
    for tokenizer in ("tokenizer", "tokenizer_2")[: 2 if family == "sdxl" else 1]:
        torch_pipeline.write_tokenizer(folder / path.stem / tokenizer)
    return path, parts


def read_config(source, component):
    return source.config(component, dict)


def from_single_file(family, path, parts, folder):
    """The pipeline that diffusers makes of the file, given the configs in a folder."""
    tokenizer = torch_pipeline.write_tokenizer(folder / "tokenizer")
    scheduler = torch_pipeline.build_scheduler()
    if family == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline(
            tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler, **parts
        )
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            tokenizer=tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
    pipeline.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return type(pipeline).from_single_file(str(path), config=str(folder), local_files_only=True)


def test_tensors_are_those_that_diffusers_reads(checkpoint, tmp_path):
    family, path, parts = checkpoint
    pipeline = from_single_file(family, path, parts, tmp_path)
    source = open_model(path)
    for component in parts:
        expected = getattr(pipeline, component).state_dict()
        ours = {
            # A text tower that stands alone has lost its prefix in transformers 5.
            name if name in expected else name.removeprefix("text_model."): tensor
            for name, tensor in source.tensors(component)
            if not name.endswith("position_ids")
        }
        assert ours.keys() == expected.keys(), component
        for name, value in expected.items():
            np.testing.assert_array_equal(ours[name], value, err_msg=f"{component} {name}")
            # That diffusers found every tensor in the file is shown here, for it may skip some.
            original = parts[component].state_dict()[name]
            np.testing.assert_array_equal(value, original, err_msg=f"{component} {name}")


def test_configs_build_the_same_networks(checkpoint):
    """In diffusers and transformers: every tensor of the same name and shape, and what they say."""
    _, path, parts = checkpoint
    source = open_model(path)
    for component, part in parts.items():
        config = read_config(source, component)
        if component.startswith("text"):
            config = transformers.CLIPTextConfig(**config)
            for key in ("hidden_act", "num_attention_heads", "eos_token_id", "layer_norm_eps"):
                assert getattr(config, key) == getattr(part.config, key), key
            built = CLASSES[component](config)
        else:
            for key in ("sample_size", "scaling_factor", "transformer_layers_per_block"):
                if key in config and component in ("unet", "vae"):
                    expected = part.config[key]
                    actual = config[key]
                    if isinstance(expected, int) and isinstance(actual, list):
                        expected = [expected] * len(actual)
                    assert np.array_equal(actual, expected), key
            built = CLASSES[component].from_config(config)
        shapes = {name: value.shape for name, value in built.state_dict().items()}
        assert shapes == {name: value.shape for name, value in part.state_dict().items()}


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_predictions_are_those_of_diffusers(family, tmp_path):
    path, parts = write_checkpoint(family, tmp_path)
    sd, params, (tokenizer,) = load_stable_diffusion(path)
    ids = np.asarray(tokenizer(["a cat"], padding="max_length").input_ids)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 4, 8, 8)).astype(np.float32)

    @jax.jit(compiler_options=QUICK_COMPILATION)
    def ours(params, ids, latents):
        context = encode_prompts(sd, params, [ids])
        return sd.predict(params["unet"], None, latents, sd.scheduler.at(jnp.array(7)), context)

    actual = ours(params, ids, latents.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    context = parts["text_encoder"](torch.from_numpy(ids)).last_hidden_state
    expected = parts["unet"](torch.from_numpy(latents), 7, context).sample
    # Norms over one channel a group cost single precision some digits.
    np.testing.assert_allclose(actual, expected, atol=2e-3, rtol=0)
    assert sd.scheduler.prediction_type == ("v_prediction" if family == "sd2" else "epsilon")
    assert not sd.scheduler.clip_sample and sd.scheduler.steps_offset == 1


def test_stable_diffusion_xl_predicts_as_diffusers_does(tmp_path):
    path, parts = write_checkpoint("sdxl", tmp_path)
    sd, params, tokenizers = load_stable_diffusion(path)
    assert sd.zero_empty_prompts and sd.vae.config.force_upcast
    ids = [np.asarray(t(["a cat"], padding="max_length").input_ids) for t in tokenizers]
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)

    @jax.jit(compiler_options=QUICK_COMPILATION)
    def ours(params, ids, latents):
        told = encode_prompts(sd, params, ids)
        return sd.predict(params["unet"], None, latents, sd.scheduler.at(jnp.array(7)), told)

    actual = ours(params, ids, latents.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    states = [
        parts[name](torch.from_numpy(row), output_hidden_states=True)
        for name, row in zip(("text_encoder", "text_encoder_2"), ids, strict=True)
    ]
    size = 8 * sd.vae.config.downscale
    added = {
        "text_embeds": states[1].text_embeds,
        "time_ids": torch.tensor([[size, size, 0, 0, size, size]]),
    }
    context = torch.cat([state.hidden_states[-2] for state in states], -1)
    expected = parts["unet"](torch.from_numpy(latents), 7, context, added_cond_kwargs=added).sample
    np.testing.assert_allclose(actual, expected, atol=2e-3, rtol=0)


def test_pickled_checkpoint_is_the_same_model(sd1, tmp_path):
    path, parts = sd1
    state = ldm_checkpoint.to_ldm("sd1", parts)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "model.ckpt")
    ours, expected = open_model(tmp_path / "model.ckpt"), open_model(path)
    for component in parts:
        assert read_config(ours, component) == read_config(expected, component)
        tensors = dict(ours.tensors(component))
        for name, tensor in expected.tensors(component):
            np.testing.assert_array_equal(tensors.pop(name), tensor)
        assert not tensors


V, NOISE = "v_prediction", "epsilon"


@pytest.mark.parametrize(
    ("family", "name", "metadata", "prediction_type", "sample_size", "assumed"),
    [
        ("sd1", "v1-5-pruned-emaonly", {}, NOISE, 256, "noise is predicted, images have 512 pix"),
        ("sd2", "v2-1_768-ema-pruned", {}, V, 384, "v is predicted, images have 768 pixels"),
        ("sd2", "512-base-ema", {}, NOISE, 256, "noise is predicted (by the 512 in its name), im"),
        ("sd2", "proj-ep51-gs05120", {}, V, 384, "v is predicted, images have 768 pixels"),
        ("sdxl", "sd_xl_base_1.0", {}, NOISE, 512, "noise is predicted, images have 1024 pixels"),
        ("sd1", "tuned", {"prediction_type": "v"}, V, 256, "assumed: images have 512 pixels"),
        ("sd2", "512", {"prediction_type": "V"}, V, 384, "assumed: images have 768 pixels"),
        ("sd2", "a", {"prediction_type": NOISE, "resolution": "640x640"}, NOISE, 320, None),
        ("sd2", "a", {"resolution": "wide"}, V, 384, "v is predicted, images have 768 pixels"),
        ("sd2", "a", {"resolution": "640x512"}, V, 384, "v is predicted, images have 768 pixels"),
        ("sd2", "a", {"resolution": "9" * 5000}, V, 384, "v is predicted, images have 768 pixels"),
        ("sd2", "a", {"architecture": "stable-diffusion-v2-512"}, NOISE, 256, "images have 512"),
        ("sd2", "512", {"architecture": "stable-diffusion-v2-768-v"}, V, 384, "images have 768"),
    ],
)
def test_what_shapes_do_not_tell(
    family, name, metadata, prediction_type, sample_size, assumed, tmp_path, capsys
):
    parts = ldm_checkpoint.build_parts(family, 10, 4)
    metadata = {f"modelspec.{key}": value for key, value in metadata.items()}
    save_file(ldm_checkpoint.to_ldm(family, parts), tmp_path / f"{name}.safetensors", metadata)
    source = open_model(tmp_path / f"{name}.safetensors")
    assert read_config(source, "scheduler")["prediction_type"] == prediction_type
    # The tiny autoencoders shrink by two where full-size ones shrink by eight.
    assert read_config(source, "unet")["sample_size"] == sample_size
    said = capsys.readouterr().out
    if assumed is None:
        assert not said
        return
    other = NOISE if prediction_type == V else V
    assert assumed in said and said.count("\n") == 1
    assert f'write {{"prediction_type": "{other}"}} into {tmp_path / name}/scheduler/sch' in said


def test_prediction_that_is_not_known_is_refused(sd1, tmp_path):
    path, parts = sd1
    metadata = {"modelspec.prediction_type": "flow"}
    save_file(ldm_checkpoint.to_ldm("sd1", parts), tmp_path / "flow.safetensors", metadata)
    with pytest.raises(UserError, match='modelspec.prediction_type="flow" is not supported; it'):
        open_model(tmp_path / "flow.safetensors")
    # What stands beside the file comes first.
    (tmp_path / "flow/scheduler").mkdir(parents=True)
    config = tmp_path / "flow/scheduler/scheduler_config.json"
    config.write_text('{"prediction_type": "epsilon"}')
    open_model(tmp_path / "flow.safetensors")


@pytest.mark.parametrize(
    ("where", "step", "prediction_type"),
    [
        ("safetensors", torch.tensor(875000), NOISE),
        ("safetensors", torch.tensor([140000]), V),
        ("safetensors", torch.tensor([875000, 875000]), V),
        ("beside", 875000, NOISE),
        ("beside", "875000", V),
        ("among", 875000, NOISE),
        ("among", torch.tensor([875000]), NOISE),
    ],
)
def test_step_of_the_first_stable_diffusion_2(where, step, prediction_type, sd2, tmp_path):
    state, path = ldm_checkpoint.to_ldm("sd2", sd2[1]), tmp_path / "model.ckpt"
    if where == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file({**state, "global_step": step}, path)
    elif where == "beside":
        torch.save({"state_dict": state, "global_step": step}, path)
    else:
        torch.save({**state, "global_step": step}, path)
    source = open_model(path)
    assert read_config(source, "scheduler")["prediction_type"] == prediction_type
    assert len(dict(source.tensors("vae")))


def with_transformers_names(state, parts, layers):
    """The tensors, with the text encoder's in transformers' names; more layers than are used."""
    state = {name: value for name, value in state.items() if not name.startswith("cond_stage")}
    text = {name.removeprefix("text_model."): value for name, value in parts.state_dict().items()}
    for layer in range(ldm_checkpoint.LAYERS_OF_VIT_H - 1, layers):
        of_last = {name: value for name, value in text.items() if ".22." in name}
        text |= {name.replace(".22.", f".{layer}."): value * 0 for name, value in of_last.items()}
    text |= {"text_projection.weight": torch.ones(4, 4)}
    prefix = "cond_stage_model.transformer.text_model."
    return {**state, **{f"{prefix}{name}": value for name, value in text.items()}}


@pytest.mark.parametrize("layers", [23, 24])
def test_either_names_are_the_same_model(layers, sd2, tmp_path, monkeypatch):
    path, parts = sd2
    state = with_transformers_names(
        ldm_checkpoint.to_ldm("sd2", parts), parts["text_encoder"], layers
    )
    if layers == 24:  # the autoencoder's other prefix, too
        state = {name.replace("first_stage_model.", "vae."): state[name] for name in state}
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / path.name)
    ours, expected = open_model(tmp_path / path.name), open_model(path)
    for component in ("unet", "vae", "text_encoder", "scheduler"):
        assert read_config(ours, component) == read_config(expected, component)
    tensors = dict(ours.tensors("text_encoder"))
    assert tensors.keys() == dict(expected.tensors("text_encoder")).keys()
    for name, tensor in expected.tensors("text_encoder"):
        np.testing.assert_array_equal(tensors[name], tensor)
    for name, tensor in ours.tensors("vae"):
        np.testing.assert_array_equal(dict(expected.tensors("vae"))[name], tensor)
    assert read_config(ours, "text_encoder")["hidden_act"] == "gelu"
    tokenizer = path.with_suffix("") / "tokenizer"
    monkeypatch.setattr(hub, "download_tokenizer", lambda name: tokenizer)
    assert ours.tokenizer().pad_token == "!"


def test_marker_tensors_tell_of_v_and_of_zero_signal(tmp_path):
    parts = ldm_checkpoint.build_parts("sdxl", 10, 4)
    markers = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file({**ldm_checkpoint.to_ldm("sdxl", parts), **markers}, tmp_path / "xl.safetensors")
    scheduler = open_model(tmp_path / "xl.safetensors").config(
        "scheduler", DDIMScheduler.from_config
    )
    assert scheduler.prediction_type == "v_prediction"
    assert scheduler.rescale_betas_zero_snr and scheduler.timestep_spacing == "trailing"


def test_folder_beside_the_file_comes_first(sd1, tmp_path):
    shutil.copy(sd1[0], tmp_path / "model.safetensors")
    unet = {**read_config(open_model(sd1[0]), "unet"), "sample_size": 24}
    for folder, file, config in (
        ("scheduler", "scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("unet", "config.json", unet),
    ):
        (tmp_path / "model" / folder).mkdir(parents=True)
        (tmp_path / "model" / folder / file).write_text(json.dumps(config))
    source = open_model(tmp_path / "model.safetensors")
    scheduler = source.config("scheduler", DDIMScheduler.from_config)
    assert scheduler.prediction_type == "v_prediction"
    # What is no whole schedule leaves the model's.
    assert scheduler.beta_schedule == "scaled_linear" and not scheduler.clip_sample
    assert source.config("unet", UNetConfig.from_dict).sample_size == 24
    assert read_config(source, "vae")["scaling_factor"] == 0.18215


def test_tokenizer_is_clips_of_the_hub_where_none_is_beside(checkpoint, tmp_path, monkeypatch):
    family, path, parts = checkpoint
    shutil.copy(path, tmp_path / "model.safetensors")
    source = open_model(tmp_path / "model.safetensors")

    torch_pipeline.write_tokenizer(tmp_path / "clip")
    asked = []
    monkeypatch.setattr(
        hub, "download_tokenizer", lambda name: asked.append(str(name)) or tmp_path / "clip"
    )
    names = ("tokenizer", "tokenizer_2") if family == "sdxl" else ("tokenizer",)
    # OpenCLIP pads with "!", the first of its vocabulary, CLIP with the end of the text.
    pads = {"sd1": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"]}[family]
    assert [source.tokenizer(name).pad_token for name in names] == pads
    assert set(asked) == {"openai/clip-vit-large-patch14"}
    ids = source.tokenizer(names[-1])(["cat"], padding="max_length", max_length=8).input_ids[0]
    assert ids[-1] == source.tokenizer(names[-1]).convert_tokens_to_ids(pads[-1])


def test_tokenizer_that_cannot_be_had_is_said_with_the_cure(sd1, tmp_path):
    shutil.copy(sd1[0], tmp_path / "model.safetensors")
    with pytest.raises(
        UserError,
        match="model.safetensors: needs CLIP's tokenizer, .* HF_HUB_OFFLINE is set, .* "
        "`hf download openai/clip-vit-large-patch14`.* into .*/model/tokenizer",
    ):
        open_model(tmp_path / "model.safetensors").tokenizer()


def test_what_is_no_whole_checkpoint_is_refused(sd1, tmp_path):
    path, parts = sd1
    state = ldm_checkpoint.to_ldm("sd1", parts)

    def refused(tensors, message):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"model.safetensors: {message}"):
            load_stable_diffusion(tmp_path / "model.safetensors")

    shutil.copytree(path.with_suffix("") / "tokenizer", tmp_path / "model" / "tokenizer")
    unet = "model.diffusion_model."
    refused(
        {name: value for name, value in state.items() if not name.startswith("first_stage")},
        r"has no tensors first_stage_model\.\*, so .*; of a diffusers pipeline give the folder",
    )
    refused(parts["unet"].state_dict(), r"has no tensors model\.diffusion_model\.\*")
    refiner = "conditioner.embedders.0.model.ln_final.weight"
    rest = {name: value for name, value in state.items() if not name.startswith("cond")}
    refused({**rest, refiner: torch.ones(4)}, "the refiner of Stable Diffusion XL is not")
    refused({**state, "edm_mean": torch.ones(4)}, "has edm_mean, .* EDM .* is not supported")
    only_unet = {name: value for name, value in state.items() if name.startswith(unet)}
    refused(only_unet, r"has no tensors first_stage_model\.\*")
    refused(
        {**state, f"{unet}motion.weight": torch.ones(2)},
        r"unet: the model has no place for tensor motion.weight \[2\]",
    )
    missing = f"{unet}output_blocks.1.0.in_layers.2.bias"
    refused(
        {name: value for name, value in state.items() if name != missing},
        r"unet: the model needs tensor up_blocks.0.resnets.1.conv1.bias \[64\], missing here",
    )
    missing = f"{unet}input_blocks.0.0.weight"
    refused(
        {name: value for name, value in state.items() if name != missing},
        "no whole Stable Diffusion; it lacks 'conv_in.weight'",
    )
    flat = {f"{unet}input_blocks.0.0.weight": torch.ones(32)}
    refused({**state, **flat}, "no Stable Diffusion; its tensors have other names or shapes")
    far = {f"{unet}input_blocks.{'9' * 5000}.0.op.weight": torch.ones(2)}
    refused({**state, **far}, "no Stable Diffusion; its tensors have other names or shapes")
    for channels in (5, 7, 8, 9):
        wider = {f"{unet}input_blocks.0.0.weight": torch.ones(32, channels, 3, 3)}
        refused({**state, **wider}, f"the unet takes {channels} channels, .* inpainting and other")
    embedding = {"label_emb.0.0": torch.ones(128, 16), "label_emb.0.2": torch.ones(128, 128)}
    refused(
        {**state, **{f"{unet}{name}.weight": value for name, value in embedding.items()}},
        'unet: class_embed_type="projection" is not supported',
    )
    with pytest.raises(UserError, match="no text_encoder_2 in this file"):
        open_model(path).config("text_encoder_2", dict)

"""What diffusers' pipelines correct or decide, beside diffusers itself.

| what | StableDiffusionPipeline | StableDiffusionXLPipeline | test |
|---|---|---|---|
| steps_offset | 1, whatever the file says | as in the file | `test_pictures` |
| clip_sample | false, whatever the file says | as in the file | `test_pictures` |
| set_alpha_to_one, timestep_spacing of another class's file | DDIM's | DDIM's | `test_schedulers` |
| skip_prk_steps, solver_order, use_karras_sigmas | not looked at | same | `test_schedulers` |
| the scale of the first noise | 1, DDIM's | same | `test_pictures` |
| sample_size below 64 of a file before 0.9.0 | 64 | as in the file | `test_sizes` |
| sample_size of [h, h] | h | an error there, h here | `test_sizes` |
| sample_size that is missing | an error there, 64 here | 128 here | `test_sizes_not_said` |
| pixels of a latent | of the VAE's levels | same | `test_sizes` |
| force_zeros_for_empty_prompt | not looked at | true unless said | `test_empty_prompts` |
| force_upcast | not looked at | true unless said | `test_decoder_in_float32` |
| use_attention_mask | masks padding; refused here | not looked at | `test_attention_mask` |
| latents_mean, latents_std | not looked at | shift latents; refused | `test_refused_by_name` |
| time_cond_proj_dim | embeds guidance; refused | same | `test_refused_by_name` |
| requires_aesthetics_score | - | five numbers; refused | `test_refused_by_name` |
| a safety checker | blanks pictures; noted here | - | `test_notes` |
| a pipeline of another class | another program; noted | same | `test_notes` |
"""

import functools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax import errors
from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion import pipeline_defaults
from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.loading import pretrained
from alignprop_jax.nn.execution import Execution
from alignprop_jax.sample import sample
from tests import torch_pipeline
from tests.torch_pipeline import diffusers, torch

# Of each correction diffusers warns, and numpy of how diffusers uses it.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation")
]

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM, EULER = ({"_class_name": f"{name}Scheduler", **BETAS} for name in ("DDIM", "EulerDiscrete"))
PIPELINES = {
    "sd": diffusers.StableDiffusionPipeline,
    "xl": diffusers.StableDiffusionXLPipeline,
}


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """All tests load the same two architectures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "abstract_params", functools.cache(pretrained.abstract_params))
        yield


@pytest.fixture(autouse=True)
def notes():
    """Notes are said once in a process: here, once in a test."""
    errors.note.cache_clear()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of each pipeline; not to be changed."""
    folders = {name: tmp_path_factory.mktemp(name) for name in PIPELINES}
    torch_pipeline.build_torch_pipeline(folders["sd"])
    torch_pipeline.build_torch_xl_pipeline(folders["xl"])
    return folders


@pytest.fixture
def edited(written, tmp_path):
    """Makes a copy of the folder with changed configs; a value of None removes its key."""

    def edit(pipeline, files, whole=False):
        folder = tmp_path / f"{pipeline}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(written[pipeline], folder)
        for file, changes in files.items():
            config = {} if whole else json.loads((folder / file).read_text())
            config |= changes
            config = {key: value for key, value in config.items() if value is not None}
            (folder / file).write_text(json.dumps(config))
        return folder

    return edit


def load_peer(pipeline, folder, **scheduler):
    """diffusers' pipeline that samples with DDIM, by the folder's files."""
    ddim = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler", **scheduler)
    options = {"add_watermarker": False} if pipeline == "xl" else {"safety_checker": None}
    peer = PIPELINES[pipeline].from_pretrained(folder, scheduler=ddim, **options)
    peer.set_progress_bar_config(disable=True)
    return peer


def draw(peer, latents, num_steps=4):
    return peer(
        "a cat",
        latents=torch.from_numpy(latents),
        num_inference_steps=num_steps,
        guidance_scale=5.0,
        output_type="np",
    ).images


@pytest.mark.parametrize(
    ("pipeline", "config", "peer_options", "noted"),
    [
        ("sd", EULER, {}, ()),
        ("sd", DDIM, {}, ()),
        ("sd", {**DDIM, "clip_sample": True, "steps_offset": 0}, {}, ("clip_", "steps_offset=0")),
        ("xl", {**DDIM, "clip_sample": True, "steps_offset": 3}, {}, ("clips",)),
        ("xl", DDIM, {}, ("clips",)),
        # Euler's own pictures are of latents that nothing clips.
        ("xl", EULER, {"clip_sample": False}, ()),
    ],
)
def test_pictures(pipeline, config, peer_options, noted, edited, tmp_path, capsys):
    folder = edited(pipeline, {"scheduler/scheduler_config.json": config}, whole=True)
    latents = np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)
    np.save(tmp_path / "latents.npy", latents)
    # The tolerance is of numbers that a random UNet lets grow.
    wanted = draw(load_peer(pipeline, folder, **peer_options), latents)
    capsys.readouterr()
    images = sample(str(folder), ["a cat"], latents=tmp_path / "latents.npy", num_steps=4)
    np.testing.assert_allclose(images, wanted, rtol=0, atol=1e-4)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(said) == len(noted)
    assert all(words in line for words, line in zip(noted, sorted(said), strict=True))


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(
    "name",
    ["DDPM", "PNDM", "EulerDiscrete", "LMSDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM"],
)
def test_schedulers(pipeline, name, edited):
    """Another class's file, as the class itself writes it: with all of its own defaults."""
    config = dict(getattr(diffusers, f"{name}Scheduler")(**BETAS).config)
    config |= {"_class_name": f"{name}Scheduler", "skip_prk_steps": True, "solver_order": 2}
    config |= {"use_karras_sigmas": True}
    config = json.loads(json.dumps(config))
    config.pop("_use_default_values", None)
    folder = edited(pipeline, {"scheduler/scheduler_config.json": config}, whole=True)
    peer = load_peer(pipeline, folder).scheduler
    ours = pipeline_defaults.read_scheduler(config, is_xl=pipeline == "xl")
    keys = {"set_alpha_to_one", "timestep_spacing", "steps_offset", "clip_sample", *BETAS}
    keys |= {"prediction_type", "rescale_betas_zero_snr", "num_train_timesteps"}
    if pipeline == "xl" and "clip_sample" not in config:
        keys.remove("clip_sample")
        assert not ours.clip_sample
    for key in keys:
        assert getattr(ours, key) == peer.config[key], key
    peer.set_timesteps(10)
    np.testing.assert_array_equal(ours.plan(10).timesteps, peer.timesteps)
    assert peer.init_noise_sigma == 1.0


@pytest.mark.parametrize(
    ("pipeline", "version", "sample_size"),
    [
        ("sd", "0.8.1", 8),
        ("sd", "0.9.0", 8),
        ("sd", "0.10.2", 8),
        ("sd", "0.6.0", 80),
        ("sd", "0.42.1", [8, 8]),
        ("xl", "0.8.1", 8),
    ],
)
def test_sizes(pipeline, version, sample_size, edited, capsys):
    said = {"_diffusers_version": version, "sample_size": sample_size}
    folder = edited(pipeline, {"unet/config.json": said})
    peer = load_peer(pipeline, folder)
    side = peer.unet.config.sample_size
    side = side[0] if isinstance(side, list) else side
    capsys.readouterr()
    sd, *_ = load_stable_diffusion(folder)
    assert sd.latent_shape == (side, side, 4)
    assert sd.sample_shape == (side * peer.vae_scale_factor, side * peer.vae_scale_factor, 3)
    assert ("sample_size=8, an outdated" in capsys.readouterr().out) == (side == 64)


def test_sizes_not_said(edited, capsys):
    for pipeline, side in (("sd", 64), ("xl", 128)):
        folder = edited(pipeline, {"unet/config.json": {"sample_size": None}})
        assert load_stable_diffusion(folder)[0].latent_shape == (side, side, 4)
        assert f"no sample_size; {side} latents a side" in capsys.readouterr().out


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("said", [True, False, None])
def test_empty_prompts(pipeline, said, edited):
    folder = edited(pipeline, {"model_index.json": {"force_zeros_for_empty_prompt": said}})
    peer = load_peer(pipeline, folder)
    wanted = bool(peer.config.get("force_zeros_for_empty_prompt", False))
    assert load_stable_diffusion(folder)[0].zero_empty_prompts == (pipeline == "xl" and wanted)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("said", [True, False, None])
def test_decoder_in_float32(pipeline, said, edited):
    folder = edited(pipeline, {"vae/config.json": {"force_upcast": said}})
    wanted = load_peer(pipeline, folder).vae.config.force_upcast and pipeline == "xl"
    sd, *_ = load_stable_diffusion(folder, Execution(jnp.dtype("bfloat16")))
    assert (sd.vae.dtype == jnp.float32) == wanted


def test_attention_mask(edited):
    masked = {"text_encoder/config.json": {"use_attention_mask": True}}
    with pytest.raises(UserError, match="text_encoder/config.json: use_attention_mask=true"):
        load_stable_diffusion(edited("sd", masked))
    load_stable_diffusion(edited("xl", masked))


@pytest.mark.parametrize(
    ("pipeline", "file", "changes", "culprit"),
    [
        ("sd", "unet/config.json", {"time_cond_proj_dim": 8}, "time_cond_proj_dim=8"),
        ("xl", "vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean="),
        (
            "xl",
            "model_index.json",
            {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True},
            "a StableDiffusionXLImg2ImgPipeline with requires_aesthetics_score=true",
        ),
        (
            "xl",
            "unet/config.json",
            {"projection_class_embeddings_input_dim": 16 + 5 * 8},
            "told five numbers beside the text, as the refiner",
        ),
        (
            "sd",
            "model_index.json",
            {"vae": ["diffusers", "AutoencoderTiny"]},
            "vae is of the class AutoencoderTiny; only AutoencoderKL",
        ),
        ("sd", "model_index.json", {"_class_name": 3}, "model_index.json: _class_name=3 is not"),
        ("xl", "model_index.json", {"force_zeros_for_empty_prompt": "no"}, '_prompt="no" is not'),
        (
            "sd",
            "unet/config.json",
            {"sample_size": [8, 16]},
            "write one number there, and give the",
        ),
        (
            "sd",
            "scheduler/scheduler_config.json",
            {"beta_end": "much"},
            'scheduler_config.json: beta_end="much" is not supported; it must be a number from 0',
        ),
    ],
)
def test_refused_by_name(pipeline, file, changes, culprit, edited):
    with pytest.raises(UserError, match=culprit):
        load_stable_diffusion(edited(pipeline, {file: changes}))


def test_refiner_is_named_though_it_lacks_parts(edited):
    folder = edited("xl", {"model_index.json": {"requires_aesthetics_score": True}})
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    with pytest.raises(UserError, match="refiner of Stable Diffusion XL"):
        load_stable_diffusion(folder)


def test_notes(edited, capsys):
    index = {
        "_class_name": "StableDiffusionImg2ImgPipeline",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    folder = edited("sd", {"model_index.json": index})
    for _ in range(2):
        load_stable_diffusion(folder)
    assert capsys.readouterr().out.splitlines() == [
        "note: model_index.json is of a StableDiffusionImg2ImgPipeline; its parts are used as a "
        "StableDiffusionPipeline's",
        "note: the model's safety checker is not run",
    ]

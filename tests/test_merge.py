"""A merged folder is what diffusers loads, and draws what we draw with the factors apart."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.generators.stable_diffusion.prompts import encode
from alignprop_jax.lora.files import load_lora
from alignprop_jax.lora.mixing import LoraMix
from alignprop_jax.merge import merge
from tests import torch_pipeline
from tests.chains import make_sample
from tests.parity import QUICK_COMPILATION
from tests.random_lora import save_random_lora
from tests.torch_pipeline import diffusers, torch

PROMPTS = ["a cat", "two dogs"]


def write_model(kind, folder):
    if kind == "sdxl":
        torch_pipeline.build_torch_xl_pipeline(folder)
        return diffusers.StableDiffusionXLPipeline
    torch_pipeline.build_torch_pipeline(folder)
    return diffusers.StableDiffusionPipeline


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_diffusers_draws_the_same_from_the_merged_folder(kind, tmp_path):
    pipeline_class = write_model(kind, tmp_path / "model")
    lora = tmp_path / "lora.safetensors"
    save_random_lora(lora, tmp_path / "model", seed=3, rank=2, alpha=3.0, size=0.3)

    merge(str(tmp_path / "model"), LoraMix((str(lora),)), tmp_path / "merged")

    sd, params, tokenizers = load_stable_diffusion(tmp_path / "model")
    encoded = encode(sd, params, tokenizers, ["", *PROMPTS])
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    sample = jax.jit(make_sample(sd, 3, 4.0), compiler_options=QUICK_COMPILATION)
    factors, _ = load_lora(lora, params)
    frozen = {"unet": params["unet"], "vae": params["vae"]}
    noise = (latents, encoded[1:], encoded[:1], jax.random.key(0))
    ours = sample(frozen, factors["unet"], *noise)

    pipeline = pipeline_class.from_pretrained(tmp_path / "merged", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        latents=torch.from_numpy(latents.transpose(0, 3, 1, 2)),
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="np",
    ).images
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert np.abs(sample(frozen, None, *noise) - theirs).mean() > 0.01


def test_the_rest_is_copied_and_types_are_kept_or_changed(tmp_path):
    torch_pipeline.build_torch_pipeline(tmp_path / "model", dtype=torch.float16)
    lora = tmp_path / "lora.safetensors"
    save_random_lora(lora, tmp_path / "model", seed=3, rank=2, alpha=2.0)
    mix = LoraMix((str(lora),), mix=0.5)
    merge(str(tmp_path / "model"), mix, tmp_path / "same")
    merge(str(tmp_path / "model"), mix, tmp_path / "wide", dtype="float32")

    unet = "unet/diffusion_pytorch_model.safetensors"
    before, same, wide = (load_file(tmp_path / name / unet) for name in ("model", "same", "wide"))
    changed = {name for name in before if not np.array_equal(before[name], same[name])}
    assert len(changed) == 32 and all(".attn" in name for name in changed)
    assert {x.dtype for x in same.values()} == {np.dtype("float16")}
    assert {x.dtype for x in wide.values()} == {np.dtype("float32")}
    for name in before:
        np.testing.assert_array_equal(same[name], wide[name].astype(np.float16))
    for file in ("model_index.json", "vae/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "same" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    vae = load_file(tmp_path / "wide" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in vae.values()} == {np.dtype("float32")}


def test_a_downloaded_model_of_links_is_merged_whole(tmp_path):
    """Of links, as caches are; with pickles beside; without the safety checker that it lists."""
    pipeline = torch_pipeline.build_torch_pipeline(tmp_path / "parts")
    pipeline.unet.save_pretrained(tmp_path / "parts/unet", safe_serialization=False)
    save_random_lora(tmp_path / "lora.safetensors", tmp_path / "parts", 3, 2, 2.0)
    source = tmp_path / "model"
    source.mkdir()
    for part in (tmp_path / "parts").iterdir():
        (source / part.name).symlink_to(part)
    index = json.loads((source / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    (source / "model_index.json").unlink()
    # With the mark that some editors put in front.
    (source / "model_index.json").write_text(json.dumps(index), encoding="utf-8-sig")

    output = tmp_path / "merged"
    output.mkdir()
    merge(str(source), LoraMix((str(tmp_path / "lora.safetensors"),)), output)

    assert {file.name for file in (output / "unet").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    merged = diffusers.StableDiffusionPipeline.from_pretrained(output, local_files_only=True)
    assert merged.safety_checker is None
    weights, before = merged.unet.state_dict(), pipeline.unet.state_dict()
    changed = {name for name in before if not torch.equal(before[name], weights[name])}
    assert len(changed) == 32


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path):
    torch_pipeline.build_torch_pipeline(tmp_path / "model")
    model = str(tmp_path / "model")
    other = tmp_path / "other"
    torch_pipeline.build_torch_xl_pipeline(other)
    save_random_lora(tmp_path / "lora.safetensors", other, seed=3, rank=2, alpha=2.0)
    lora = LoraMix((str(tmp_path / "lora.safetensors"),))
    output = tmp_path / "merged"

    with pytest.raises(UserError, match="the LoRA was made for another model"):
        merge(model, lora, output)
    with pytest.raises(UserError, match="there is nothing to merge; give --lora=FILE"):
        merge(model, LoraMix(), output)
    with pytest.raises(UserError, match="--lora_timesteps cannot be merged"):
        merge(model, LoraMix(lora.files, timesteps=(900, 100)), output)
    with pytest.raises(UserError, match="other is there already; remove it, or give another"):
        merge(model, lora, other)
    torch_pipeline.build_torch_pipeline(tmp_path / "pickled").save_pretrained(
        tmp_path / "pickled", safe_serialization=False
    )
    (tmp_path / "pickled/unet/diffusion_pytorch_model.safetensors").unlink()
    save_random_lora(tmp_path / "fitting.safetensors", tmp_path / "model", 3, 2, 2.0)
    fitting = LoraMix((str(tmp_path / "fitting.safetensors"),))
    with pytest.raises(UserError, match="model.bin: weights that are changed must be safetensors"):
        merge(str(tmp_path / "pickled"), fitting, output)
    (tmp_path / "merged.partial").mkdir()
    (tmp_path / "merged.partial/file").touch()
    with pytest.raises(UserError, match="merged.partial is there already"):
        merge(model, fitting, output)
    (tmp_path / "merged.partial/file").unlink()
    (tmp_path / "merged.partial").rmdir()
    (tmp_path / "model/unet/diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="truncated, or not a safetensors file"):
        merge(model, fitting, output)
    (tmp_path / "file.safetensors").touch()
    with pytest.raises(UserError, match="file.safetensors: a folder is needed here"):
        merge(str(tmp_path / "file.safetensors"), lora, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "file.safetensors",
        "fitting.safetensors",
        "lora.safetensors",
        "model",
        "other",
        "pickled",
    ]
    assert json.loads((other / "model_index.json").read_text())


def test_a_signal_leaves_nothing_of_a_merge(tmp_path):
    code = """
import sys, time
from pathlib import Path
from alignprop_jax.errors import run_program
from alignprop_jax.merge import _whole_or_not_at_all

def main(argv):
    with _whole_or_not_at_all(Path(sys.orig_argv[-1])) as partial:
        for number in range(10000):
            (partial / f"{number}.safetensors").touch()
            if number == 100:
                print(flush=True)
            time.sleep(0.001)

sys.argv = sys.argv[:1]
run_program(main)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "merged")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.terminate()
    assert process.communicate()[1] == "interrupted by SIGTERM\n"
    assert process.returncode == 143
    assert not list(tmp_path.iterdir())

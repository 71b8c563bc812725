"""What loading a model of a gigabyte costs in memory."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from tests import torch_pipeline
from tests.loading import ldm_checkpoint
from tests.torch_pipeline import diffusers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model as a folder with two variants, and as a single file."""
    folder = tmp_path_factory.mktemp("models")
    parts = ldm_checkpoint.build_parts("sd1", torch_pipeline.VOCAB_SIZE, torch_pipeline.MAX_LENGTH)
    # Of the widths of Stable Diffusion 1.5.
    parts["unet"] = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(640, 1280),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
    )
    tokenizer = torch_pipeline.write_tokenizer(folder / "model" / "tokenizer")
    save_file(ldm_checkpoint.to_ldm("sd1", parts), folder / "model.safetensors")
    pipeline = diffusers.StableDiffusionPipeline(
        tokenizer=tokenizer,
        scheduler=torch_pipeline.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )
    pipeline.save_pretrained(folder / "folder", max_shard_size="300MB")
    pipeline.to(torch_pipeline.torch.float16).save_pretrained(folder / "folder", variant="fp16")
    return folder


@pytest.mark.parametrize("model", ["folder", "folder:fp16", "model.safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_second_copy_of_the_weights_is_in_memory(models, model, dtype):
    process = subprocess.run(
        [sys.executable, "-m", "tests.loading.loading_cost", models / model, dtype],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.returncode == 0, process.stderr
    cost = json.loads(process.stdout.splitlines()[-1])
    print(model, dtype, cost)
    assert cost["params_bytes"] > (1e9 if dtype == "float32" else 5e8)
    assert cost["peak_bytes"] < 1.3 * cost["params_bytes"]

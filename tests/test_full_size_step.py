"""A whole AlignProp run on Stable Diffusion 1.5 at its real size, with random weights.

`pytest -m full_size tests/test_full_size_step.py -s` reports its time and memory.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import nano_run

pytestmark = pytest.mark.full_size

_VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline and a CLIP, written by another process, whose memory is its own."""
    folder = tmp_path_factory.mktemp("sd15")
    subprocess.run([sys.executable, "-m", __name__, str(folder)], check=True)
    (folder / "prompts.txt").write_text("a cat\n")
    return folder


def test_two_updates_in_bfloat16(folder):
    changes = {
        "model": folder / "model",
        "prompts": folder / "prompts.txt",
        "eval_prompts": folder / "prompts.txt",
        "aesthetic.clip": folder / "clip",
        "sampler.num_steps": 2,
        "truncation.strategy": "full",
        "train.num_steps": 2,
        "train.batch_size": 1,
        "train.microbatch_size": 1,
        "checkpoint.every": 0,
        "logging.image_every": 0,
    }
    arguments = [f"--config.{key}={value}" for key, value in changes.items()]
    workdir = folder / "run"
    process = nano_run.run("train", "configs/sd15.py:aesthetic", workdir, *arguments)
    assert process.returncode == 0, process.stderr[-2000:]

    metrics = nano_run.read_records(workdir / "metrics.jsonl")
    assert all(np.isfinite([m["loss"], m["grad_norm"]]).all() for m in metrics)
    assert all(m["grad_norm"] > 0 for m in metrics)
    summary = json.loads((workdir / "summary.json").read_text())
    seconds, peak = summary["seconds_per_step"], summary["peak_rss_gb"]
    print(f"\n{seconds:.0f} s a step, peak memory {peak:.1f} GB")
    assert peak < 20
    factors = load_file(workdir / "lora" / "pytorch_lora_weights.safetensors")
    assert sum(tensor.size for tensor in factors.values()) == 797_184
    for name, tensor in factors.items():
        if name.endswith("lora_B.weight"):
            assert np.abs(tensor).max() > 0, name


if __name__ == "__main__":
    from pathlib import Path

    from tests import full_size_reference, torch_pipeline

    output = Path(sys.argv[1])
    full_size_reference.write_pipeline("sd15", output / "model")
    transformers = torch_pipeline.transformers
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
            vision_config=_VIT_L_14,
            projection_dim=768,
        )
    )
    torch_pipeline.randomize_parameters(clip).half().save_pretrained(output / "clip")
    transformers.CLIPImageProcessorPil().save_pretrained(output / "clip")

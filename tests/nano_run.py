"""The smallest real run: a random-weight model, rewards in a file, a config, and the programs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

NUM_STEPS = 8

REWARDS = """
import jax.numpy as jnp

def redness(images, prompts):
    return images[..., 0].mean(axis=(1, 2)) - images[..., 2].mean(axis=(1, 2))

def undefined(images, prompts):
    return jnp.log(images.mean(axis=(1, 2, 3)) - 2.0)

def infinite(images, prompts):
    return 1.0 / (images.mean(axis=(1, 2, 3)) * 0.0)

def flat(images, prompts):
    return jnp.maximum(images.mean(axis=(1, 2, 3)) - 2.0, 0.0)

def in_bytes(images, prompts):
    return (images * 255).astype(jnp.uint8).astype(jnp.float32).mean(axis=(1, 2, 3))

def one_number(images, prompts):
    return images.mean()
"""

CONFIG = """
from alignprop_jax.config import default_config

def get_config():
    config = default_config()
    config.model = {folder!r} + "/model"
    config.prompts = {folder!r} + "/train.txt"
    config.eval_prompts = {folder!r} + "/unseen.txt"
    config.reward = {folder!r} + "/rewards.py:redness"
    config.sampler.num_steps = 3
    config.truncation.max = 2
    config.train.num_steps = {num_steps}
    config.train.batch_size = 2
    config.evaluation.samples_per_prompt = 2
    config.checkpoint.every = 2
    config.logging.image_every = 4
    config.logging.tensorboard = False
    return config
"""


def write_nano_project(folder: Path) -> Path:
    """Writes model, prompts, rewards and config to `folder`; returns the config's file."""
    write_nano_model(folder / "model")
    (folder / "train.txt").write_text("a cat\na dog\na fox\n")
    (folder / "unseen.txt").write_text("a cow\n")
    (folder / "rewards.py").write_text(REWARDS)
    config = folder / "config.py"
    config.write_text(CONFIG.format(folder=str(folder), num_steps=NUM_STEPS))
    return config


def write_nano_model(folder: Path):
    """Writes a pipeline of one level and one layer, 8x8 pixels; returns diffusers' object of it."""
    from tests import torch_pipeline

    pipeline = torch_pipeline.diffusers.StableDiffusionPipeline(
        vae=torch_pipeline.build_vae(block_out_channels=(16,)),
        text_encoder=torch_pipeline.build_text_encoder(num_hidden_layers=1),
        tokenizer=torch_pipeline.write_tokenizer(folder / "tokenizer"),
        unet=torch_pipeline.build_unet(
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        ),
        scheduler=torch_pipeline.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def command(program: str, config: Path, workdir: Path, *arguments: str) -> list[str]:
    """Returns the command line of a program that takes a config and a workdir."""
    flags = [f"--config={config}", f"--workdir={workdir}", *arguments]
    return [sys.executable, "-m", f"alignprop_jax.{program}", *flags]


def run(program: str, config: Path, workdir: Path, *arguments: str):
    """Runs a program to its end and returns the completed process."""
    line = command(program, config, workdir, *arguments)
    return subprocess.run(line, capture_output=True, text=True, timeout=1800)


def run_until_killed(config: Path, workdir: Path, after_lines: int) -> None:
    """Starts training and ends it with SIGKILL when metrics.jsonl has so many lines."""
    process = subprocess.Popen(command("train", config, workdir), stderr=subprocess.DEVNULL)
    try:
        while len(read_lines(workdir / "metrics.jsonl")) < after_lines:
            assert process.poll() is None, "training ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a file; none when it is absent."""
    return path.read_text().splitlines() if path.exists() else []


def read_records(path: Path) -> list[dict]:
    """Returns the records of a file of JSON lines, without wall-clock times."""
    records = [json.loads(line) for line in read_lines(path)]
    return [{k: v for k, v in record.items() if k != "step_seconds"} for record in records]


def read_tree(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file below a folder."""
    return {
        os.path.relpath(path, folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

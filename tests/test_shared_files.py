"""What is made to be shared says which model and files it is of, and nothing of where they lay."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from alignprop_jax.config import default_config
from alignprop_jax.generators.stable_diffusion.load import adaptable_shapes
from alignprop_jax.loading.tensor_files import (
    read_metadata,
    read_safetensors,
    write_safetensors,
)
from alignprop_jax.lora.factors import init_lora
from alignprop_jax.lora.files import LORA_FILE, load_lora, save_lora
from alignprop_jax.lora.kohya import save_kohya_lora
from alignprop_jax.lora.mixing import LoraMix
from alignprop_jax.merge import merge
from alignprop_jax.pages import comparison as page
from alignprop_jax.pages.sweep import lora_name, write_page
from alignprop_jax.records.metrics import write_json
from alignprop_jax.records.places import name_of, score_name
from alignprop_jax.records.workdir import Workdir
from alignprop_jax.runs.trained_weights import describe
from alignprop_jax.trials import results
from alignprop_jax.trials.methods import Method
from alignprop_jax.trials.runs import Run
from tests import nano_run
from tests.random_lora import randomize_lora

USER = "alice"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory with a model, prompts and a reward."""
    pytest.importorskip("torch")
    home = tmp_path / USER
    nano_run.write_nano_project(home / "art")
    monkeypatch.setenv("HOME", str(home))
    return home


def config_of(home):
    config = default_config()
    config.model = str(home / "art" / "model")
    config.prompts = str(home / "art" / "train.txt")
    config.eval_prompts = "~/art/unseen.txt"
    config.reward = {str(home / "art" / "rewards.py") + ":redness": 2.0, "aesthetic": 0.5}
    config.lora.init = str(home / "loras" / "first.safetensors")
    return config


def lora_of(home):
    shapes = adaptable_shapes(str(home / "art" / "model"))["unet"]
    return shapes, randomize_lora(init_lora(jax.random.key(0), shapes))


def assert_nothing_of_a_home(folder):
    files = [file for file in Path(folder).rglob("*") if file.is_file()]
    assert files
    for file in files:
        assert USER.encode() not in file.read_bytes(), file


def test_names_in_place_of_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sd").mkdir(parents=True)
    assert name_of("/home/alice/models/sd15/") == name_of("~/sd15") == "sd15"
    assert name_of("/home/alice/my rewards.py:redness") == "my rewards.py:redness"
    assert name_of("gs://bucket/alice/sd15") == name_of(r"C:\\Users\\alice\\sd15") == "sd15"
    assert name_of("runs/sd") == name_of("./sd") == "sd"
    for name in ("owner/sd", "owner/sd:fp16", "emoji", "photo and/or picture", "", "a: b"):
        assert name_of(name) == name
    assert score_name("reward//home/alice/r.py:redness") == "reward/r.py:redness"
    assert score_name("judge") == "judge" and score_name("reward") == "reward"


def test_lora_files(home, tmp_path):
    shapes, lora = lora_of(home)
    metadata = describe(config_of(home))
    save_lora(tmp_path / "shared" / LORA_FILE, lora, 4.0, metadata)
    save_kohya_lora(tmp_path / "shared" / "k.safetensors", lora, 4.0, shapes, "epsilon", metadata)
    assert_nothing_of_a_home(tmp_path / "shared")
    _, header = load_lora(tmp_path / "shared", {"unet": shapes})
    assert header["base_model"] == "model"
    assert header["reward"] == "2 rewards.py:redness + 0.5 aesthetic"
    said = json.loads(header["config"])
    assert (said["prompts"], said["eval_prompts"]) == ("train.txt", "unseen.txt")
    assert said["lora"]["init"] == "first.safetensors"


def test_the_same_factors_give_the_same_bytes(home, tmp_path):
    shapes, lora = lora_of(home)
    written = set()
    for number in range(4):
        # The order in which entries come is of no account.
        entries = [("base_model", "a"), ("reward", "b"), ("config", "c"), ("more", "d")]
        metadata = dict(entries[number:] + entries[:number])
        save_lora(tmp_path / "lora.safetensors", lora, 4.0, metadata)
        written.add((tmp_path / "lora.safetensors").read_bytes())
    assert len(written) == 1


def test_merged_folders(home, tmp_path):
    model = home / "art" / "model"
    _, lora = lora_of(home)
    save_lora(home / "lora.safetensors", lora, 4.0)
    for name in ("model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"):
        file = model / name
        said = {"_name_or_path": str(model), "special_tokens_map_file": f"{home}/map.json"}
        file.write_text(json.dumps(json.loads(file.read_text()) | said))
    unet = model / "unet" / "diffusion_pytorch_model.safetensors"
    entries = {"base_model": str(model), "config": json.dumps({"model": str(model)})}
    write_safetensors(dict(read_safetensors(unet)), unet, entries)
    merge(str(model), LoraMix((str(home / "lora.safetensors"),)), tmp_path / "merged")
    assert_nothing_of_a_home(tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / "model_index.json").read_text())
    assert index["_name_or_path"] == "model" and "unet" in index
    header = read_metadata(tmp_path / "merged" / "unet" / unet.name)
    assert header == {"format": "pt", "base_model": "model", "config": '{"model": "model"}'}


def test_pages(home, tmp_path):
    config = config_of(home)
    (tmp_path / "shared").mkdir()
    reward = str(home / "art" / "rewards.py") + ":redness"
    record = {"mix": 0.5, "lora_timesteps": [1000, 0], "n": 1, "reward_mean": 1.0}
    write_page(
        tmp_path / "shared" / "sweep.html",
        [record | {f"reward/{reward}_mean": 1.0, "reward/aesthetic_mean": 2.0}],
        [np.zeros((1, 8, 8, 3), np.uint8)],
        prompts=["a cat"],
        files=[str(home / "runs" / "glossy" / "lora"), str(home / LORA_FILE)],
        model=config.model,
        weights=config.reward,
        num_timesteps=1000,
    )
    run = Run("fast", Method("ddpo", "ddpo"), 0, home / "runs" / "fast", config, ("python",))
    found = {"baseline": "ddpo", "rewards": {}}
    page.write_page(tmp_path / "shared" / "comparison.html", found, [run])
    assert_nothing_of_a_home(tmp_path / "shared")
    assert "glossy" in (tmp_path / "shared" / "sweep.html").read_text()
    assert lora_name(str(home / "lora")) == "lora"


def test_scores_of_a_comparison(home, tmp_path):
    run = Run("fast", Method("ddpo", "ddpo"), 0, home / "run", config_of(home), ("python",))
    run.path.mkdir()
    score = f"reward/{home}/art/rewards.py:redness"
    num_steps = run.config.train.num_steps
    scores = {"n": 1, "reward_mean": 1.0, f"{score}_mean": 2.0}
    summary = {"steps": num_steps, "seconds_per_step": 1.0, "peak_rss_gb": 1.0}
    (run.path / "summary.json").write_text(json.dumps(summary))
    workdir = Workdir(run.path)
    for step in (0, num_steps):
        for split in ("train", "unseen"):
            workdir.evaluations.append({"step": step, "split": split, **scores})
    for step in range(1, num_steps + 1):
        workdir.metrics.append({"step": step, "step_seconds": 1.0})
    found = results.gather([run])
    assert found["rewards"]["fast"]["ddpo"]["train"].keys() == {
        "reward",
        "reward/rewards.py:redness",
    }
    (tmp_path / "shared").mkdir()
    write_json(tmp_path / "shared" / "comparison.json", found)
    assert_nothing_of_a_home(tmp_path / "shared")

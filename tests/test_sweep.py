"""The sweep over alpha and timesteps, on the smallest real model."""

import json

import jax
import numpy as np
import pytest

from alignprop_jax.config import default_config, load_config
from alignprop_jax.errors import UserError
from alignprop_jax.evaluate import evaluate
from alignprop_jax.generators.stable_diffusion.load import adaptable_shapes
from alignprop_jax.lora.factors import ATTENTION_PROJECTIONS, init_lora
from alignprop_jax.lora.files import LORA_FILE, save_parts
from alignprop_jax.lora.mixing import LoraMix
from alignprop_jax.sweep import add_rewards, default_ranges, sweep
from tests import nano_run
from tests.random_lora import randomize_lora, save_random_lora

BRIGHTNESS = """
def brightness(images, prompts):
    return images.mean(axis=(1, 2, 3))
"""


@pytest.fixture(scope="module")
def files(nano_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    files = [folder / name / "lora" / LORA_FILE for name in ("a", "b")]
    for seed, file in enumerate(files):
        save_random_lora(file, nano_config.parent / "model", seed, rank=1 + seed, alpha=1.0 + seed)
    return [str(file) for file in files]


def test_every_point_scores_what_evaluate_does(nano_config, files, tmp_path):
    brightness = tmp_path / "extra.py"
    brightness.write_text(BRIGHTNESS)
    flags = [f"--lora={file}" for file in files]
    flags += [f"--rewards={brightness}:brightness", "--points=3"]
    flags += ["--lora_timesteps=1000:0", "--lora_timesteps=1000:500"]
    workdir = tmp_path / "sweep"
    process = nano_run.run("sweep", nano_config, workdir, *flags)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"6 points; see {workdir / 'sweep.html'}\n"
    records = nano_run.read_records(workdir / "sweep.jsonl")
    points = [(record["mix"], *record["lora_timesteps"]) for record in records]
    assert points == [(alpha, 1000, low) for low in (0, 500) for alpha in (0.0, 0.5, 1.0)]

    config = load_config(str(nano_config))
    scorers = {"brightness": lambda images, prompts: images.mean(axis=(1, 2, 3))}
    for mix, high, low in ((0.5, 1000, 500), (1.0, 1000, 0)):
        lora = LoraMix(tuple(files), mix, (high, low))
        expected = evaluate(config, tmp_path / "evaluation", lora, scorers=scorers)["unseen"]
        record = records[points.index((mix, high, low))]
        assert record["n"] == expected["n"] == 2
        redness = f"reward/{config.reward}"
        for name, wanted in (
            (redness, "reward"),
            (f"reward/{brightness}:brightness", "brightness"),
        ):
            for moment in ("mean", "std"):
                np.testing.assert_allclose(
                    record[f"{name}_{moment}"], expected[f"{wanted}_{moment}"], atol=1e-5
                )
    assert len({round(record["reward_mean"], 4) for record in records}) == 6
    page = (workdir / "sweep.html").read_text()
    assert page.count("data:image/webp;base64,") == 6


def test_one_lora_is_set_against_the_base_model(nano_config, tmp_path):
    """One that adapts the text encoder, too."""
    config = load_config(str(nano_config))
    shapes = adaptable_shapes(config.model)
    targets = {"unet": ATTENTION_PROJECTIONS, "text_encoder": ("q_proj", "fc1", "fc2")}
    parts = {
        part: randomize_lora(init_lora(jax.random.key(0), shapes[part], 2, of_part), size=0.8)
        for part, of_part in targets.items()
    }
    save_parts(tmp_path / "lora.safetensors", parts)
    files = [str(tmp_path / "lora.safetensors")]
    settings = {"points": 2, "ranges": [(1000, 0)], "scorers": {}}
    records = sweep(config, tmp_path / "sweep", files[:1], **settings)
    expected = [
        evaluate(config, tmp_path / "evaluation", LoraMix((file,)), scorers={})["unseen"][
            "reward_mean"
        ]
        for file in ("none", files[0])
    ]
    raw = [record[f"reward/{config.reward}_mean"] for record in records]
    np.testing.assert_allclose(raw, expected, atol=1e-5)
    # The sum is of standard scores, though it has one part.
    parts = json.loads((tmp_path / "sweep" / "reward_parts.json").read_text())
    mean, std = parts[config.reward]
    standard = [(value - mean) / std for value in raw]
    np.testing.assert_allclose([r["reward_mean"] for r in records], standard, rtol=1e-3)
    again = sweep(config, tmp_path / "sweep", files[:1], **settings)
    assert again == records
    assert len((tmp_path / "sweep" / "sweep.jsonl").read_text().splitlines()) == 2


def test_what_cannot_be_swept_is_refused_before_anything_is_loaded(nano_config, tmp_path):
    config = load_config(str(nano_config))
    for files, message in ((["a", "b", "c"], "3 --lora are given"), ([], "give --lora=FILE")):
        with pytest.raises(UserError, match=message):
            sweep(config, tmp_path / "new", files)
    assert not (tmp_path / "new").exists()


def test_rewards_are_added_without_weight():
    config = default_config()
    extended = add_rewards(config, ["jpeg_compress", "aesthetic"])
    assert extended.reward == {"aesthetic": 1.0, "jpeg_compress": 0.0}
    assert config.reward == "aesthetic"
    config.reward = {"aesthetic": 2.0, "count": 0.5}
    assert add_rewards(config, ["x.py:f"]).reward == {"aesthetic": 2.0, "count": 0.5, "x.py:f": 0.0}


def test_default_ranges_go_from_the_first_quarter_to_the_last():
    early = [(1000, 750), (1000, 500), (1000, 250)]
    late = [(750, 0), (500, 0), (250, 0)]
    assert default_ranges(1000) == [*early, (1000, 0), *late]

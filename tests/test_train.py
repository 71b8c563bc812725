import json
import math
import shutil
import subprocess
import time

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image
from safetensors.numpy import load_file

from alignprop_jax.algorithms.presets import use_algorithm
from alignprop_jax.config import load_config
from alignprop_jax.errors import UserError
from alignprop_jax.evaluation.evaluator import Evaluator
from alignprop_jax.experiment import load_experiment
from alignprop_jax.loading.tensor_files import read_metadata
from alignprop_jax.train import is_due, train
from alignprop_jax.train_steps import create_state
from tests import nano_run

METRICS = {
    "step",
    "reward_mean",
    "reward_std",
    "loss",
    "grad_norm",
    "step_seconds",
    "start_step",
}
SUMMARY = {
    "reward_before",
    "reward_after",
    "unseen_before",
    "unseen_after",
    "steps",
    "reward_queries",
    "seconds_compile",
    "seconds_per_step",
    "seconds_total",
    "peak_rss_gb",
}


@pytest.fixture
def config(nano_config):
    return load_config(str(nano_config))


@pytest.fixture
def finished_copy(finished_run, tmp_path):
    return shutil.copytree(finished_run[0], tmp_path / "run")


def test_a_run_leaves_the_files_it_promises(finished_run):
    workdir, _ = finished_run
    metrics = [json.loads(line) for line in nano_run.read_lines(workdir / "metrics.jsonl")]
    assert [record["step"] for record in metrics] == list(range(1, nano_run.NUM_STEPS + 1))
    assert all(record.keys() == METRICS for record in metrics)
    assert all(0 <= record["start_step"] < 3 for record in metrics)
    evaluations = nano_run.read_records(workdir / "eval.jsonl")
    assert [(e["step"], e["split"], e["n"]) for e in evaluations] == [
        (0, "train", 6),
        (0, "unseen", 2),
        (nano_run.NUM_STEPS, "train", 6),
        (nano_run.NUM_STEPS, "unseen", 2),
    ]
    assert all(e.keys() == {"step", "split", "reward_mean", "reward_std", "n"} for e in evaluations)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary.keys() == SUMMARY
    assert summary["reward_before"] == evaluations[0]["reward_mean"]
    assert summary["unseen_after"] == evaluations[3]["reward_mean"]
    assert (summary["steps"], summary["reward_queries"]) == (nano_run.NUM_STEPS, 16)
    assert 0 < summary["seconds_compile"] < summary["seconds_total"]
    assert 0.1 < summary["peak_rss_gb"] < 10
    assert json.loads((workdir / "config.json").read_text())["lora"]["rank"] == 4
    for name in ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"):
        header = read_metadata(workdir / "lora" / name)
        assert json.loads(header["config"]) == json.loads((workdir / "config.json").read_text())
        assert header["base_model"].endswith("model") and header["reward"].endswith("redness")
    pictures = {path.stem for path in (workdir / "images").glob("*.png")}
    assert pictures == {
        *(f"{split}_{when}" for split in ("train", "unseen") for when in ("before", "after")),
        "train_before_after",
        "unseen_before_after",
        "preview_000004",
        "preview_000008",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm, overrides",
    [
        ("refl", {"gradient.stop_share": 0.7}),
        # As programs these are AlignProp's; their gradients are compared in tests/algorithms.
        ("draft_lv", {"train.microbatch_size": 1}),
        ("draft", {}),
        ("draft_k", {"truncation.k": 2}),
        ("drtune", {"truncation.k": 2}),
    ],
)
def test_a_run_of_each_algorithm(config, tmp_path, algorithm, overrides):
    use_algorithm(config, algorithm)
    config.update_from_flattened_dict(
        {"train.num_steps": 2, "logging.image_every": 0, "checkpoint.every": 0, **overrides}
    )
    train(config, tmp_path / "run")
    metrics = nano_run.read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [1, 2]
    assert all(record["grad_norm"] > 0 for record in metrics)
    starts = {"draft": {0}, "draft_k": {1}, "draft_lv": {2}, "refl": {1, 2}, "drtune": {0, 1}}
    assert {record["start_step"] for record in metrics} <= starts[algorithm]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reward_queries"] == (12 if algorithm == "draft_lv" else 4)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["algorithm"] == algorithm
    assert saved["truncation"]["strategy"] == config.truncation.strategy


def test_training_raises_the_reward(finished_run):
    workdir, _ = finished_run
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["reward_after"] > summary["reward_before"]
    assert summary["unseen_after"] > summary["unseen_before"]
    before, after = (
        np.asarray(Image.open(workdir / "images" / f"train_{when}.png"))
        for when in ("before", "after")
    )
    assert before.shape == after.shape and not np.array_equal(before, after)


def test_a_run_goes_on_from_a_lora_file(config, finished_run, tmp_path):
    finished, _ = finished_run
    before = json.loads((finished / "summary.json").read_text())
    file = tmp_path / "lora.safetensors"
    shutil.copy(finished / "lora" / "comfyui_lora.safetensors", file)
    config.lora.init = str(file)
    config.train.num_steps = 1
    train(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reward_before"] == pytest.approx(before["reward_after"], abs=1e-5)
    assert summary["unseen_before"] == pytest.approx(before["unseen_after"], abs=1e-5)

    file.unlink()
    config.train.num_steps = 2
    train(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_a_lora_file_of_another_model_or_rank_is_refused(config, finished_run, tmp_path):
    from tests import torch_pipeline

    finished, _ = finished_run
    config.lora.init = str(finished / "lora")
    config.lora.rank = 2
    with pytest.raises(UserError, match="lora.init=.* is of rank 4; config.lora.rank=2 must be"):
        train(config, tmp_path / "run")
    torch_pipeline.build_torch_pipeline(tmp_path / "model")
    config.model, config.lora.rank = str(tmp_path / "model"), 4
    with pytest.raises(UserError, match="the LoRA was made for another model"):
        train(config, tmp_path / "run")


def test_the_last_line_says_what_rose_and_where_things_are(finished_run):
    workdir, printed = finished_run
    summary = json.loads((workdir / "summary.json").read_text())
    last = printed.splitlines()[-1]
    assert f"{summary['reward_before']:.3f} -> {summary['reward_after']:.3f}" in last
    assert f"{summary['unseen_before']:.3f} -> {summary['unseen_after']:.3f}" in last
    assert f"{workdir}/images" in last
    assert f"{workdir}/lora/pytorch_lora_weights.safetensors" in last


def test_base_weights_are_never_written(finished_run):
    workdir, _ = finished_run
    lora = load_file(workdir / "lora" / "pytorch_lora_weights.safetensors")
    factors = sum(array.size for array in lora.values())
    for step in ("6", "8"):
        saved = jax.tree.leaves(ocp.metadata(workdir / "checkpoints" / step).metadata)
        # The factors and AdamW's two moments of each, and a few counters and keys.
        assert 3 * factors < sum(math.prod(leaf.shape) for leaf in saved) < 3 * factors + 20
    steps = [path.name for path in (workdir / "checkpoints").iterdir() if path.is_dir()]
    assert sorted(steps) == ["6", "8"]


def test_a_killed_run_resumes_to_the_same_numbers(finished_run, nano_config, tmp_path):
    expected, workdir = finished_run[0], tmp_path / "run"
    nano_run.run_until_killed(nano_config, workdir, after_lines=5)
    assert not (workdir / "summary.json").exists()
    # A kill may come in the middle of a line, too.
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "rewa')
    process = nano_run.run("train", nano_config, workdir)
    assert process.returncode == 0, process.stderr
    assert "resumed after step" in process.stdout
    for name in ("metrics.jsonl", "eval.jsonl"):
        records = nano_run.read_records(workdir / name)
        assert records == nano_run.read_records(expected / name), name
    resumed, uninterrupted = (nano_run.read_tree(path / "images") for path in (workdir, expected))
    # The file of arrays records when it was written.
    assert resumed.pop("before.npz") and uninterrupted.pop("before.npz")
    assert resumed == uninterrupted
    # The bytes of the files may differ by the order of the metadata.
    resumed, uninterrupted = (
        load_file(path / "lora" / "pytorch_lora_weights.safetensors")
        for path in (workdir, expected)
    )
    assert resumed.keys() == uninterrupted.keys()
    for name, array in resumed.items():
        np.testing.assert_array_equal(array, uninterrupted[name], name)


def test_sigterm_makes_a_checkpoint_and_the_run_resumes(finished_run, nano_config, tmp_path):
    expected, workdir = finished_run[0], tmp_path / "run"
    # No checkpoint but the one that the signal is answered with.
    arguments = nano_config, workdir, "--config.checkpoint.every=0"
    line = nano_run.command("train", *arguments)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    while len(nano_run.read_lines(workdir / "metrics.jsonl")) < 3:
        assert process.poll() is None, "training ended before it could be stopped"
        time.sleep(0.005)
    process.terminate()
    printed, _ = process.communicate()
    stopped = len(nano_run.read_lines(workdir / "metrics.jsonl"))
    assert process.returncode == 0
    assert printed.splitlines()[-1].startswith(f"stopped after step {stopped};")
    assert (workdir / "checkpoints" / str(stopped)).is_dir()
    process = nano_run.run("train", *arguments)
    assert process.returncode == 0, process.stderr
    assert f"resumed after step {stopped}" in process.stdout
    records = nano_run.read_records(workdir / "metrics.jsonl")
    assert records == nano_run.read_records(expected / "metrics.jsonl")


def test_a_finished_run_says_so_and_changes_nothing(config, finished_copy, capsys):
    before = nano_run.read_tree(finished_copy)
    train(config, finished_copy)
    assert capsys.readouterr().out.startswith("already finished: reward ")
    assert nano_run.read_tree(finished_copy) == before


def test_ten_steps_without_a_gradient_stop_the_run(config, finished_run, finished_copy):
    # The finished run is prolonged with a reward that is NaN: the steps before stay.
    config.train.num_steps = 30
    config.reward = config.reward.replace("redness", "undefined")
    with pytest.raises(
        UserError, match="10 steps in a row, up to step 18 .*step 8 is kept.*:undefined' is nan"
    ):
        train(config, finished_copy)
    metrics = nano_run.read_records(finished_copy / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, 19))
    assert metrics[:8] == nano_run.read_records(finished_run[0] / "metrics.jsonl")
    assert all(record["loss"] is None for record in metrics[8:])
    assert not (finished_copy / "summary.json").exists()
    steps = [path.name for path in (finished_copy / "checkpoints").iterdir() if path.is_dir()]
    assert sorted(steps) == ["6", "8"]


def test_first_steps_without_a_gradient_stop_the_run(config, tmp_path, capsys):
    config.reward = config.reward.replace("redness", "flat")
    with pytest.raises(UserError, match="exactly 0 up to step 8.*rewards.py:flat' does not change"):
        train(config, tmp_path / "run")
    # The same command does not go on as if nothing were wrong.
    config.train.num_steps = 20
    with pytest.raises(UserError, match="exactly 0 up to step 10"):
        train(config, tmp_path / "run")
    config.train.num_steps = 8
    out = capsys.readouterr().out
    assert out.count("note: the gradient is exactly 0 at first; the reward '") == 2
    assert not (tmp_path / "run/summary.json").exists()
    # One that no gradient is asked of, because no step was drawn, is none of these.
    config.truncation.update({"min": 3, "max": 3})
    with pytest.raises(UserError, match="trains none of the 3 sampler steps"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("when", ["before", "preview", "after"])
def test_a_sample_that_is_not_finite_ends_the_run(config, tmp_path, monkeypatch, when):
    """Nothing is drawn of it, and what was trained is kept."""
    config.train.num_steps = 2
    config.logging.image_every = 1
    of_batches = Evaluator._sample_batch
    calls = []

    def sample_batch(self, lora, split, prompts, rows, lora_timesteps=None):
        images, inputs = of_batches(self, lora, split, prompts, rows, lora_timesteps)
        calls.append(len(rows))
        # Batches of the evaluation before, 3 + 1; of two previews; of that after.
        spoilt = {"before": 1, "preview": 5, "after": 7}[when]
        return (images.at[1].set(np.nan) if len(calls) == spoilt else images), inputs

    monkeypatch.setattr(Evaluator, "_sample_batch", sample_batch)
    with pytest.raises(UserError, match='of 2 samples 1 are NaN or infinite: "a dog"'):
        train(config, tmp_path / "run")
    pictures = {path.stem for path in (tmp_path / "run/images").glob("*.png")}
    assert (
        pictures
        == {
            "before": set(),
            "preview": {"train_before", "unseen_before"},
            "after": {"train_before", "unseen_before", "preview_000001", "preview_000002"},
        }[when]
    )
    assert (tmp_path / "run/lora").exists() == (when == "after")


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("lora.rank", 3, r"LoRA rank \[4\], this run \[3\]; give this run another --workdir"),
        ("lora.alpha", 8.0, "LoRA alpha 4.0, this run 8.0"),
        ("lora.targets", ("to_q",), "LoRA targets"),
        ("dtype", "bfloat16", "dtype float32, this run bfloat16"),
    ],
)
def test_a_checkpoint_of_another_lora_is_refused(config, finished_copy, key, value, named):
    config.update_from_flattened_dict({key: value})
    before = nano_run.read_tree(finished_copy)
    with pytest.raises(UserError, match=named):
        train(config, finished_copy)
    assert nano_run.read_tree(finished_copy) == before


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("prompts", "absent.txt", "prompts 'absent.txt' cannot be read"),
        ("eval_prompts", "{folder}/empty.txt", "empty.txt' is empty"),
        ("reward", "no_such_reward", "reward 'no_such_reward' not found"),
        ("reward", "{folder}/absent.py:f", "no file"),
        ("reward", "{folder}/rewards.py:absent", "no function 'absent'"),
        ("reward", "{folder}/rewards.py:one_number", "one score an image"),
        ("reward", "{folder}/rewards.py:in_bytes", "in_bytes' has a gradient of exactly 0"),
        ("model", "{folder}/absent/model", "no such folder"),
        ("model", "{folder}/truncated", "truncated"),
        ("model", "{folder}/without_unet", "unet"),
        ("train.batch_size", 0, "config.train.batch_size=0 must be a whole number"),
    ],
)
def test_bad_input_is_named(config, nano_config, tmp_path, key, value, named):
    (tmp_path / "empty.txt").touch()
    shutil.copy(nano_config.parent / "rewards.py", tmp_path)
    shutil.copytree(nano_config.parent / "model", tmp_path / "truncated")
    weights = tmp_path / "truncated/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(nano_config.parent / "model", tmp_path / "without_unet")
    shutil.rmtree(tmp_path / "without_unet/unet")
    if isinstance(value, str):
        value = value.format(folder=tmp_path)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=named) as info:
        train(config, tmp_path / "run")
    assert "\n" not in str(info.value)


def test_a_workdir_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="workdir .*file/run' cannot be written .Not a directory"):
        train(config, tmp_path / "file" / "run")


def test_bad_flags_are_one_line(nano_config, tmp_path):
    process = nano_run.run("train", nano_config, tmp_path / "run", "--config.train.num_step=3")
    assert process.returncode == 2
    assert process.stderr == (
        "error: unknown config key config.train.num_step; did you mean config.train.num_steps?\n"
    )
    process = nano_run.run("train", nano_config, tmp_path / "run", "--config.lora.rank=four")
    assert process.returncode == 2
    assert process.stderr.startswith("error: flag --config.lora.rank=four: ")
    assert process.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_seed_decides_the_first_factors(config):
    experiment = load_experiment(config)
    first, again = (create_state(config, experiment) for _ in range(2))
    config.train.seed = 1
    other = create_state(config, experiment)

    def down(state):
        (block,) = (state.lora["down_blocks.0"]["attentions.0"]["transformer_blocks.0"],)
        return np.asarray(block["attn1"]["to_q"]["down"])

    np.testing.assert_array_equal(down(first), down(again))
    assert not np.array_equal(down(first), down(other))


def test_every_zero_is_never():
    assert [step for step in range(1, 7) if is_due(step, 3)] == [3, 6]
    assert not any(is_due(step, 0) for step in range(1, 7))

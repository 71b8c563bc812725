import errno
import functools
import json
import math
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image
from safetensors.numpy import load_file

from alignprop_jax.algorithms.presets import use_algorithm
from alignprop_jax.config import load_config
from alignprop_jax.errors import UserError
from alignprop_jax.evaluate import evaluate
from alignprop_jax.evaluation.evaluator import Evaluator
from alignprop_jax.generators.stable_diffusion.load import adaptable_shapes
from alignprop_jax.loading.tensor_files import read_metadata
from alignprop_jax.lora.factors import ATTENTION_PROJECTIONS, init_lora
from alignprop_jax.lora.files import load_lora, save_parts
from alignprop_jax.lora.mixing import LoraMix
from alignprop_jax.runs.experiment import load_experiment
from alignprop_jax.runs.train_step import create_state
from alignprop_jax.train import is_due, train
from tests import nano_run
from tests.random_lora import randomize_lora

LORA_FILES = ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors")
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
    for name in LORA_FILES:
        header = read_metadata(workdir / "lora" / name)
        config = json.loads((workdir / "config.json").read_text())
        folder = str(Path(config["model"]).parent)
        names = ("model", "prompts", "eval_prompts", "reward")
        config |= {key: config[key].removeprefix(f"{folder}/") for key in names}
        assert json.loads(header["config"]) == config
        assert (header["base_model"], header["reward"]) == ("model", "rewards.py:redness")
        assert folder.encode() not in (workdir / "lora" / name).read_bytes()
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


def test_a_part_for_the_text_encoder_applies_and_stays_in_the_file(config, tmp_path):
    """At the first evaluation, after a resume without the file, and in what the run writes."""
    shapes = adaptable_shapes(config.model)
    parts = {
        part: randomize_lora(init_lora(jax.random.key(0), shapes[part], 4, targets), size=size)
        for part, targets, size in (
            ("unet", ATTENTION_PROJECTIONS, 0.3),
            ("text_encoder", ("q_proj", "fc1", "fc2"), 1.0),
        )
    }
    file, without = tmp_path / "lora.safetensors", tmp_path / "without.safetensors"
    save_parts(file, parts)
    save_parts(without, {"unet": parts["unet"]})
    expected, plain = rewards_of(config, tmp_path, file, without)
    assert abs(expected - plain) > 1e-3

    config.lora.init, config.train.num_steps = str(file), 1
    train(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reward_before"] == pytest.approx(expected, abs=1e-5)
    file.unlink()
    config.train.num_steps = 2
    train(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    written = [tmp_path / "run" / "lora" / name for name in LORA_FILES]
    for file in written:
        loaded, _ = load_lora(file, shapes)
        same = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        jax.tree.map(same, loaded["text_encoder"], parts["text_encoder"])
    for reward in rewards_of(config, tmp_path, *written):
        assert reward == pytest.approx(summary["reward_after"], abs=1e-5)


def rewards_of(config, folder, *files):
    loras = [LoraMix((str(file),)) for file in files]
    results = evaluate(config, folder / "evaluated", *loras, scorers={})["loras"]
    return [result["train"]["reward_mean"] for result in results]


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
    for name in LORA_FILES:
        resumed, uninterrupted = (path / "lora" / name for path in (workdir, expected))
        assert resumed.read_bytes() == uninterrupted.read_bytes(), name


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
    assert process.returncode == 143
    assert printed.splitlines()[-1].startswith(f"stopped after step {stopped};")
    assert (workdir / "checkpoints" / str(stopped)).is_dir()
    process = nano_run.run("train", *arguments)
    assert process.returncode == 0, process.stderr
    assert f"resumed after step {stopped}" in process.stdout
    records = nano_run.read_records(workdir / "metrics.jsonl")
    assert records == nano_run.read_records(expected / "metrics.jsonl")


def test_a_second_run_in_a_folder_is_refused(nano_config, tmp_path):
    workdir = tmp_path / "run"
    with subprocess.Popen(
        nano_run.command("train", nano_config, workdir), stdout=subprocess.PIPE, text=True
    ) as first:
        while not (workdir / ".lock").exists():
            assert first.poll() is None
            time.sleep(0.005)
        process = nano_run.run("train", nano_config, workdir)
        assert process.returncode == 1
        refusal = f"error: workdir '{workdir}' is in use by process {first.pid} on host "
        assert process.stderr.startswith(refusal) and process.stderr.count("\n") == 1
        assert first.communicate()[0].splitlines()[-1].startswith("reward ")
    assert first.returncode == 0
    steps = [record["step"] for record in nano_run.read_records(workdir / "metrics.jsonl")]
    assert steps == list(range(1, nano_run.NUM_STEPS + 1))
    assert not (workdir / ".lock").exists()


def test_a_finished_run_says_so_and_changes_nothing(config, finished_copy, capsys):
    before = nano_run.read_tree(finished_copy)
    train(config, finished_copy)
    assert capsys.readouterr().out.startswith("already finished: reward ")
    assert nano_run.read_tree(finished_copy) == before


def test_ten_steps_without_a_gradient_stop_the_run(config, finished_run, finished_copy):
    # The finished run is prolonged at a rate that makes its factors infinite.
    config.train.num_steps = 30
    # Each step multiplies the factors by a million, until the samples are NaN.
    config.train.learning_rate = config.train.weight_decay = 1000.0
    # An evaluation on the way would stop at samples that are NaN.
    config.evaluation.every = config.logging.image_every = config.checkpoint.keep_best = 0
    with pytest.raises(UserError, match="10 steps in a row, up to step .*step 8 is kept") as caught:
        train(config, finished_copy)
    metrics = nano_run.read_records(finished_copy / "metrics.jsonl")
    last = int(re.search(r"up to step (\d+)", str(caught.value))[1])
    assert [record["step"] for record in metrics] == list(range(1, last + 1))
    assert metrics[:8] == nano_run.read_records(finished_run[0] / "metrics.jsonl")
    assert all(record["grad_norm"] is None for record in metrics[-10:])
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
        ("lora.rank", 3, "config.lora.rank was 4, is now 3; give it another --workdir"),
        ("prompts", "animals", "config.prompts was '.*train.txt', is now 'animals'"),
        ("reward", "{folder}/rewards.py:undefined", "config.reward was .*redness', is now"),
        ("train.seed", 1, "config.train.seed was 0, is now 1"),
    ],
)
@pytest.mark.parametrize("num_steps", [nano_run.NUM_STEPS, 30])
def test_the_run_of_another_config_is_refused(
    config, nano_config, finished_copy, key, value, named, num_steps
):
    """Whether it is to go on or has come to its end."""
    config.train.num_steps = num_steps
    if isinstance(value, str):
        value = value.format(folder=nano_config.parent)
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


def test_a_checkpoint_of_another_lora_is_refused_though_its_config_is_lost(config, finished_copy):
    (finished_copy / "config.json").write_text("")
    config.train.num_steps, config.lora.rank = 30, 3
    with pytest.raises(UserError, match=r"LoRA rank \[4\], this run \[3\]; give this run another"):
        train(config, finished_copy)


def test_a_finished_run_without_checkpoints_is_not_begun_anew(config, finished_copy, capsys):
    shutil.rmtree(finished_copy / "checkpoints")
    before = nano_run.read_tree(finished_copy)
    train(config, finished_copy)
    assert capsys.readouterr().out.startswith("already finished: reward ")
    config.train.num_steps = 9
    with pytest.raises(UserError, match="finished after 8 steps and has no checkpoint to go on"):
        train(config, finished_copy)
    assert nano_run.read_tree(finished_copy) == before


def test_what_a_run_has_lost_is_measured_again(nano_config, finished_run, finished_copy):
    """The end of the run is what is left to do: it is as it was."""
    (finished_copy / "summary.json").write_bytes(b"")
    (finished_copy / "config.json").write_bytes(b"\0" * 10)
    (finished_copy / "images" / "before.npz").unlink()
    (finished_copy / "images" / "train_before.png").unlink()
    evaluations = (finished_copy / "eval.jsonl").read_bytes().split(b"\n")
    (finished_copy / "eval.jsonl").write_bytes(b"\n".join([b"{]", *evaluations[1:3], b"\xff"]))
    with (finished_copy / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 30 + b'\n{"step": 9, "st\x9e')
    process = nano_run.run("train", nano_config, finished_copy)
    assert process.returncode == 0, process.stderr
    for said in (
        "summary.json cannot be read",
        "config.json cannot be read",
        "metrics.jsonl: line 9 cannot be read",
        "eval.jsonl: line 1 cannot be read",
        "before.npz cannot be used (No such file or directory)",
        "evaluations of step 0 are missing and are done again",
    ):
        assert process.stdout.count(said) == 1, said
    for name in ("metrics.jsonl", "eval.jsonl"):
        records = nano_run.read_records(finished_copy / name)
        assert records == nano_run.read_records(finished_run[0] / name), name
    images, expected = (nano_run.read_tree(w / "images") for w in (finished_copy, finished_run[0]))
    assert images.pop("before.npz") and expected.pop("before.npz")
    assert images == expected
    summaries = [
        json.loads((w / "summary.json").read_text()) for w in (finished_copy, finished_run[0])
    ]
    for name in ("reward_before", "reward_after", "unseen_before", "unseen_after"):
        assert summaries[0][name] == summaries[1][name]


def test_the_evaluation_that_a_run_goes_on_from_is_done_again(config, finished_copy, capsys):
    config.evaluation.every, config.train.num_steps = 4, 9
    evaluations = [
        line
        for line in nano_run.read_lines(finished_copy / "eval.jsonl")
        if json.loads(line)["step"] == 0 or json.loads(line)["split"] == "train"
    ]
    before = nano_run.read_records(finished_copy / "eval.jsonl")
    (finished_copy / "eval.jsonl").write_text("\n".join(evaluations))
    train(config, finished_copy)
    assert "evaluations of step 8 are missing" in capsys.readouterr().out
    after = nano_run.read_records(finished_copy / "eval.jsonl")
    assert [(e["step"], e["split"]) for e in after[:4]] == [(e["step"], e["split"]) for e in before]
    for again, was in zip(after[:4], before, strict=True):
        assert again["reward_mean"] == pytest.approx(was["reward_mean"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("written", range(12))
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    config, finished_run, tmp_path, monkeypatch, written
):
    """At the first file that the disk has to hold, at the second, ..."""
    real, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) > 3 * written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="run cannot be written to .No space left on device.;"):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    for name in ("metrics.jsonl", "eval.jsonl"):
        records, expected = (
            nano_run.read_records(workdir / name) for workdir in (tmp_path / "run", finished_run[0])
        )
        assert [record["step"] for record in records] == [record["step"] for record in expected]
        for record, wanted in zip(records, expected, strict=True):
            assert record["reward_mean"] == pytest.approx(wanted["reward_mean"], abs=1e-5)


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

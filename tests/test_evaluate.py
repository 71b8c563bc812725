import json
import shutil

import numpy as np
import pytest

from alignprop_jax.config import load_config
from alignprop_jax.errors import UserError, note
from alignprop_jax.evaluate import describe, evaluate
from alignprop_jax.lora.mixing import BASE_MODEL, NO_LORA, LoraMix
from tests import nano_run


@pytest.fixture
def config(nano_config):
    return load_config(str(nano_config))


@pytest.fixture
def workdir(finished_run, tmp_path):
    return shutil.copytree(finished_run[0], tmp_path / "run")


def test_the_exported_lora_scores_what_training_reported(config, workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    brightness = {"brightness": lambda images, prompts: images.mean(axis=(1, 2, 3))}
    results = evaluate(config, workdir, NO_LORA, scorers=brightness)
    assert results["train"]["n"] == 6 and results["unseen"]["n"] == 2
    np.testing.assert_allclose(results["train"]["reward_mean"], summary["reward_after"], rtol=1e-5)
    np.testing.assert_allclose(results["unseen"]["reward_mean"], summary["unseen_after"], rtol=1e-5)
    assert 0 < results["train"]["brightness_mean"] < 1
    assert json.loads((workdir / "evaluation.json").read_text()) == results
    assert (workdir / "images" / "unseen_evaluation.png").is_file()
    low, high = results["train"]["reward_ci95"]
    assert low < results["train"]["reward_mean"] < high
    # One prompt tells nothing of others.
    assert "reward_ci95" not in results["unseen"]
    rows = [line.split() for line in describe(results).splitlines()]
    train, unseen = results["train"], results["unseen"]
    ends = [f"{low:.3f}", "to", f"{high:.3f}"]
    assert ["reward", f"{train['reward_mean']:.3f}", *ends, f"{train['reward_std']:.3f}"] in rows
    brightness = (unseen["brightness_mean"], unseen["brightness_std"])
    assert ["brightness", *(f"{value:.3f}" for value in brightness)] in rows


def test_the_base_model_scores_what_training_began_with(config, workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    results = evaluate(config, workdir, LoraMix((BASE_MODEL,)), scorers={})
    np.testing.assert_allclose(results["train"]["reward_mean"], summary["reward_before"], atol=1e-5)


def test_two_loras_in_the_program(nano_config, workdir):
    """Mixed with itself, a LoRA is what it was; on at no timestep, it is none."""
    summary = json.loads((workdir / "summary.json").read_text())
    loras = [f"--lora={workdir / 'lora'}"] * 2
    for flags, key in (([], "after"), (["--lora_timesteps=1000:1000"], "before")):
        process = nano_run.run("evaluate", nano_config, workdir, *loras, "--mix=0.25", *flags)
        assert process.returncode == 0, process.stderr
        results = json.loads((workdir / "evaluation.json").read_text())
        expected = [summary[f"reward_{key}"], summary[f"unseen_{key}"]]
        actual = [results[split]["reward_mean"] for split in ("train", "unseen")]
        np.testing.assert_allclose(actual, expected, atol=1e-5)
        assert results["lora"].startswith(f"0.25 {workdir / 'lora'} + 0.75 {workdir / 'lora'}")


def test_the_run_of_another_model_is_refused(config, workdir):
    """Other prompts are what evaluation is for; another model is not that of the run's LoRA."""
    contents = json.loads((workdir / "contents.json").read_text())
    (workdir / "contents.json").write_text(json.dumps(contents | {"model": "0123"}))
    config.prompts = config.eval_prompts
    with pytest.raises(UserError, match="config.model=.* names has changed since it began"):
        evaluate(config, workdir, NO_LORA, scorers={})
    (workdir / "contents.json").unlink()
    saved = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(saved | {"model": "other"}))
    with pytest.raises(UserError, match="config.model was 'other', is now"):
        evaluate(config, workdir, NO_LORA, scorers={})
    (workdir / "config.json").write_text(json.dumps(saved))
    assert evaluate(config, workdir, NO_LORA, scorers={})["train"]["n"] == 2


def test_a_workdir_without_a_lora(config, tmp_path):
    with pytest.raises(UserError, match="no LoRA in .*; train first, or give --lora=FILE"):
        evaluate(config, tmp_path / "new", NO_LORA, scorers={})


def test_several_loras_and_rewards_at_once(nano_config, workdir):
    """In a program: the trained one, the base model, by a reward of a file and by one of a name."""
    summary = json.loads((workdir / "summary.json").read_text())
    further = f"{nano_config.parent}/rewards.py:redness"
    flags = [f"--lora={workdir / 'lora'}", "--lora=none", f"--rewards={further},jpeg_compress"]
    process = nano_run.run("evaluate", nano_config, workdir, *flags)
    assert process.returncode == 0, process.stderr
    results = json.loads((workdir / "evaluation.json").read_text())["loras"]
    for result, when in zip(results, ("after", "before"), strict=True):
        train = result["train"]
        assert train["reward_mean"] == pytest.approx(summary[f"reward_{when}"], abs=1e-5)
        assert train[f"reward/{further}_mean"] == pytest.approx(train["reward_mean"], abs=1e-6)
        assert train["reward/jpeg_compress_mean"] < 0
        assert f"LoRA {result['lora']}" in process.stdout
    assert (workdir / "images" / "unseen_evaluation_2.png").is_file()


def test_a_reward_that_is_not_finite_is_said(config, workdir, capsys):
    for name, value in (("undefined", "nan"), ("infinite", "inf")):
        config.reward = config.reward.replace("redness", name).replace("undefined", name)
        note.cache_clear()
        results = evaluate(config, workdir, NO_LORA, scorers={})
        out = capsys.readouterr().out
        for split, number in (("train", 6), ("unseen", 2)):
            assert f"{results[split]['reward_mean']}" == value
            assert "reward_ci95" not in results[split]
            assert (
                f"note: reward is NaN or infinite for {number} of {number} samples, {split}" in out
            )
        assert value in describe(results)

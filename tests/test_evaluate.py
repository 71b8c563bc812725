import json
import shutil

import numpy as np
import pytest

from alignprop_jax.config import load_config
from alignprop_jax.errors import UserError
from alignprop_jax.evaluate import BASE_MODEL, describe, evaluate


@pytest.fixture
def config(nano_config):
    return load_config(str(nano_config))


@pytest.fixture
def workdir(finished_run, tmp_path):
    return shutil.copytree(finished_run[0], tmp_path / "run")


def test_the_exported_lora_scores_what_training_reported(config, workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    brightness = {"brightness": lambda images, prompts: images.mean(axis=(1, 2, 3))}
    results = evaluate(config, workdir, None, brightness)
    assert results["train"]["n"] == 6 and results["unseen"]["n"] == 2
    np.testing.assert_allclose(results["train"]["reward_mean"], summary["reward_after"], rtol=1e-5)
    np.testing.assert_allclose(results["unseen"]["reward_mean"], summary["unseen_after"], rtol=1e-5)
    assert 0 < results["train"]["brightness_mean"] < 1
    assert json.loads((workdir / "evaluation.json").read_text()) == results
    assert (workdir / "images" / "unseen_evaluation.png").is_file()
    lines = describe(results).splitlines()
    assert len(lines) == 3 and f"reward {results['train']['reward_mean']:.3f} +- " in lines[1]
    assert f"brightness {results['unseen']['brightness_mean']:.3f} +- " in lines[2]


def test_the_base_model_scores_what_training_began_with(config, workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    results = evaluate(config, workdir, BASE_MODEL, {})
    np.testing.assert_allclose(results["train"]["reward_mean"], summary["reward_before"], atol=1e-5)


def test_a_workdir_without_a_lora(config, tmp_path):
    with pytest.raises(UserError, match="no LoRA in .*; train first, or give --lora=FILE"):
        evaluate(config, tmp_path / "new", None, {})

"""The configs of full-size models: valid, and with the numbers that were published."""

import pytest

from alignprop_jax.config import load_config, validate
from alignprop_jax.errors import UserError
from alignprop_jax.runs.recipes import REWARDS, SETTINGS


@pytest.mark.parametrize("file", ["sd15", "sd21", "sdxl"])
def test_every_variant_is_valid(file):
    for reward in REWARDS:
        for setting in ("", *(f"_{name}" for name in SETTINGS)):
            config = load_config(f"configs/{file}.py:{reward}{setting}")
            assert config.reward == reward
            validate(config)
    if file == "sdxl":
        for setting in ("", "_k1", "_trl"):
            config = load_config(f"configs/sdxl.py:turbo_aesthetic{setting}")
            assert (config.sampler.num_steps, config.sampler.guidance_scale) == (4, 1.0)
            validate(config)


@pytest.mark.parametrize(
    "setting, strategy, guidance, eta, decay, clip",
    [
        ("", "uniform", 7.5, 0.0, 0.1, 5.0),
        ("_paper_code", "per_step", 7.5, 0.0, 0.1, 5.0),
        ("_repository", "gaussian", 5.0, 1.0, 1e-4, 1.0),
        ("_trl", "per_step", 5.0, 1.0, 1e-4, 1.0),
    ],
)
def test_released_settings(setting, strategy, guidance, eta, decay, clip):
    config = load_config(f"configs/sd15.py:aesthetic{setting}")
    assert config.truncation.strategy == strategy
    assert (config.sampler.guidance_scale, config.sampler.eta) == (guidance, eta)
    assert (config.train.weight_decay, config.train.max_grad_norm) == (decay, clip)
    assert (config.train.learning_rate, config.train.batch_size, config.lora.rank) == (1e-3, 128, 4)
    expected = ("negative", 1.0) if setting == "_trl" else ("target", 0.01)
    assert (config.loss.shape, config.loss.scale) == expected


def test_the_last_steps_are_trained():
    truncation = load_config("configs/sd15.py:hps_k10").truncation
    assert (truncation.strategy, truncation.start) == ("fixed", 40)


@pytest.mark.parametrize("variant", ["aesthetic_k2", "beauty", "aesthetic_"])
def test_unknown_variant_is_refused_with_those_there_are(variant):
    with pytest.raises(UserError, match=f"{variant}.*aesthetic, hps.*_k1, _k10"):
        load_config(f"configs/sd15.py:{variant}")

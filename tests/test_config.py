import json

import pytest

from alignprop_jax.config import (
    check_key,
    default_config,
    describe_changes,
    load_config,
    to_json,
    validate,
)
from alignprop_jax.errors import UserError
from alignprop_jax.truncation import STRATEGIES

# What the programs promise to understand: a key that goes missing here breaks somebody's command.
CONTRACT = """
    algorithm model prompts eval_prompts reward remat dtype
    sampler.num_steps sampler.guidance_scale sampler.eta
    truncation.strategy truncation.start truncation.mean truncation.std
    truncation.min truncation.max
    lora.rank lora.alpha lora.targets
    train.num_steps train.batch_size train.learning_rate train.weight_decay train.max_grad_norm
    train.seed train.microbatch_size checkpoint.every checkpoint.keep
""".split()


def test_default_config_is_valid_and_has_every_promised_key():
    config = default_config()
    validate(config)
    for key in CONTRACT:
        check_key(config, key)


def test_default_config_has_the_published_lora_and_optimizer():
    config = default_config()
    assert (config.lora.rank, config.train.learning_rate, config.train.max_grad_norm) == (
        4,
        1e-3,
        1.0,
    )
    assert config.lora.targets == ("to_q", "to_k", "to_v", "to_out.0")
    assert (config.sampler.num_steps, config.truncation.strategy) == (50, "uniform")


def test_emoji_config_is_valid():
    validate(load_config("configs/emoji.py"))
    validate(load_config("configs/emoji.py:aesthetic"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_truncation_strategy_is_allowed(strategy):
    config = default_config()
    config.truncation.strategy = strategy
    validate(config)


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("algorithm", "sgd", "config.algorithm='sgd' must be one of alignprop"),
        ("loss.shape", "cubic", "config.loss.shape='cubic' must be one of target"),
        ("truncation.strategy", "none", "config.truncation.strategy='none' must be one of full"),
        ("remat", "all", "config.remat='all' must be one of none, step"),
        ("dtype", "float16", "config.dtype='float16' must be one of float32, bfloat16"),
        ("train.batch_size", 0, "config.train.batch_size=0 must be above 0"),
        ("train.learning_rate", -1e-3, "config.train.learning_rate=-0.001 must be above 0"),
        ("train.microbatch_size", 3, "config.train.microbatch_size=3 must be a divisor of"),
        ("train.beta2", 1.0, r"config.train.beta2=1.0 must be in \[0, 1\)"),
        ("checkpoint.keep", 0, "config.checkpoint.keep=0 must be above 0"),
        ("sampler.eta", 1.5, r"config.sampler.eta=1.5 must be in \[0, 1\]"),
        ("sampler.guidance_scale", 0.5, "config.sampler.guidance_scale=0.5 must be 1 or more"),
        ("sampler.num_steps", 20, "truncation.max is 49; with 20 sampler steps"),
        ("model", "", "config.model='' must be not empty"),
        ("lora.targets", (), r"config.lora.targets=\(\) must be not empty"),
        ("reward", 3, "config.reward=3 must be a name or a dict"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(key, value, named):
    config = default_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=named):
        validate(config)


def test_a_file_cannot_smuggle_in_an_unknown_key_or_another_type():
    config = default_config()
    config.train.learning_rat = 1.0
    with pytest.raises(UserError, match="unknown .*learning_rat; did you mean .*learning_rate?"):
        validate(config)
    config = default_config()
    with config.ignore_type():
        config.train.batch_size = "8"
    with pytest.raises(UserError, match="config.train.batch_size='8' must be of type int"):
        validate(config)
    config = default_config()
    del config.lora.alpha
    with pytest.raises(UserError, match="config.lora.alpha is missing"):
        validate(config)


@pytest.mark.parametrize(
    "key, suggestion",
    [
        ("train.num_step", "config.train.num_steps"),
        ("trian.num_steps", "config.train.num_steps"),
        ("learning_rate", "config.train.learning_rate"),
        ("lora.ranks", "config.lora.rank"),
        ("train", "config.train."),
    ],
)
def test_an_unknown_key_gets_the_nearest_one(key, suggestion):
    with pytest.raises(UserError, match=f"unknown config key config.{key}; did you mean") as info:
        check_key(default_config(), key)
    assert suggestion in str(info.value)


def test_config_file_errors(tmp_path):
    with pytest.raises(UserError, match="config file 'nope.py' not found"):
        load_config("nope.py:aesthetic")
    with pytest.raises(UserError, match="no variant 'x'.*aesthetic"):
        load_config("configs/emoji.py:x")
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module")
    with pytest.raises(UserError, match="broken.py.* fails: ModuleNotFoundError"):
        load_config(str(broken))
    broken.write_text("def get_config():\n    return None")
    with pytest.raises(UserError, match="must return a ConfigDict"):
        load_config(str(broken))


def test_json_and_changes_round_trip():
    config = default_config()
    config.reward = {"aesthetic": 1.0, "file.py:fn": 0.5}
    validate(config)
    saved = json.loads(to_json(config))
    assert saved["lora"]["targets"] == ["to_q", "to_k", "to_v", "to_out.0"]
    assert saved["reward"] == {"aesthetic": 1.0, "file.py:fn": 0.5}
    assert describe_changes(saved, config) == []
    config.train.num_steps = 7
    assert describe_changes(saved, config) == ["train.num_steps: 100 -> 7"]

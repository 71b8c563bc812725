import json
import subprocess
import sys

import pytest

from alignprop_jax.algorithms.presets import PRESETS, WITHOUT_REWARD_GRADIENT, use_algorithm
from alignprop_jax.config import (
    check_key,
    default_config,
    find_changes,
    load_config,
    to_json,
    validate,
)
from alignprop_jax.core.truncation import STRATEGIES
from alignprop_jax.errors import UserError

# What the programs promise to understand: a key that goes missing here breaks somebody's command.
CONTRACT = """
    algorithm model prompts eval_prompts reward remat dtype
    sampler.num_steps sampler.guidance_scale sampler.eta
    truncation.strategy truncation.start truncation.mean truncation.std
    truncation.min truncation.max truncation.k
    gradient.detach_input gradient.reward_at gradient.stop_share gradient.renoise
    lora.rank lora.alpha lora.targets
    train.num_steps train.batch_size train.learning_rate train.weight_decay train.max_grad_norm
    train.seed train.microbatch_size checkpoint.every checkpoint.keep
""".split()

BACKPROPAGATING = [name for name in PRESETS if name not in WITHOUT_REWARD_GRADIENT]


def test_default_config_is_valid_and_has_every_promised_key():
    config = default_config()
    validate(config)
    for key in CONTRACT:
        check_key(key)


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
        ("algorithm", "sgd", 'algorithm="sgd" must be "alignprop" or'),
        ("gradient.reward_at", "noise", 'gradient.reward_at="noise" must be "sample" or "pred'),
        ("gradient.renoise", -1, "config.gradient.renoise=-1 must be a whole number from 0 to"),
        ("loss.shape", "cubic", 'loss.shape="cubic" must be "target"'),
        ("truncation.strategy", "none", 'truncation.strategy="none" must be "full"'),
        ("remat", "all", 'remat="all" must be "auto" or "none" or "partial"'),
        ("dtype", "float16", 'dtype="float16" must be "float32" or "bfloat16"'),
        ("train.batch_size", 0, "config.train.batch_size=0 must be a whole number from 1 to"),
        (
            "train.learning_rate",
            -1e-3,
            "config.train.learning_rate=-0.001 must be a number from 1e-30 to",
        ),
        ("train.microbatch_size", 3, "config.train.microbatch_size=3 must be a divisor of"),
        ("train.beta2", 1.0, "config.train.beta2=1.0 must be a number from 0 to 0.999999"),
        ("checkpoint.keep", 0, "config.checkpoint.keep=0 must be a whole number from 1"),
        ("sampler.eta", 1.5, "config.sampler.eta=1.5 must be a number from 0 to 1"),
        (
            "sampler.guidance_scale",
            0.5,
            "config.sampler.guidance_scale=0.5 must be a number from 1 to",
        ),
        ("sampler.num_steps", 20, "truncation.max is 49; with 20 sampler steps"),
        ("model", "", 'config.model="" must be a string of 1 to'),
        ("lora.targets", (), r"config.lora.targets=\[\] must be a list of 1 to 64"),
        (
            "reward",
            3,
            "config.reward=3 must be a string of 1 to 4096 valid characters, or an object",
        ),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(key, value, named):
    config = default_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=named):
        validate(config)


@pytest.mark.parametrize("algorithm", BACKPROPAGATING)
@pytest.mark.parametrize("num_steps", [10, 50])
def test_an_algorithm_is_its_settings_whatever_was_set_before(algorithm, num_steps):
    config = default_config()
    for other in PRESETS:
        use_algorithm(config, other)
    use_algorithm(config, algorithm)
    config.sampler.num_steps = num_steps
    config.truncation.max = num_steps
    validate(config)
    assert config.algorithm == algorithm
    path = (config.gradient.detach_input, config.gradient.reward_at, config.gradient.renoise)
    assert (config.truncation.strategy, *path) == {
        "alignprop": ("uniform", False, "sample", 0),
        "draft": ("full", False, "sample", 0),
        "draft_k": ("last", False, "sample", 0),
        "draft_lv": ("last", False, "sample", 2),
        "refl": ("last", False, "prediction", 0),
        "drtune": ("spaced", True, "prediction", 0),
    }[algorithm]


@pytest.mark.parametrize("algorithm", [name for name in BACKPROPAGATING if name != "alignprop"])
def test_a_name_without_its_steps_is_refused(algorithm):
    config = default_config()
    config.algorithm = algorithm
    with pytest.raises(UserError, match=rf"use_algorithm\(config, '{algorithm}'\) sets"):
        validate(config)


def test_ddpo_needs_noise():
    config = default_config()
    use_algorithm(config, "ddpo")
    validate(config)
    config.sampler.eta = 0.0
    with pytest.raises(UserError, match="sampler.eta=0 adds none; set config.sampler.eta to 1"):
        validate(config)


@pytest.mark.parametrize("algorithm", WITHOUT_REWARD_GRADIENT)
def test_minibatches_divide_the_batch(algorithm):
    config = default_config()
    use_algorithm(config, algorithm)
    config.rollouts.minibatches = 3
    with pytest.raises(UserError, match="rollouts.minibatches=3 must be a divisor of .*=8"):
        validate(config)


def test_there_is_no_draft_k_of_no_steps():
    config = default_config()
    use_algorithm(config, "draft_k")
    config.truncation.k = 0
    with pytest.raises(UserError, match="truncation.k is 0; .* between 1 and 50"):
        validate(config)
    with pytest.raises(UserError, match="config.algorithm='draft_l' must be one of alignprop, dr"):
        use_algorithm(config, "draft_l")


def read_command_line(*arguments):
    """The config that a program gets."""
    program = """
from alignprop_jax.config import define_config_flag, to_json
from alignprop_jax.errors import run_program
config = define_config_flag()
run_program(lambda argv: print(to_json(config.value)))
"""
    line = [sys.executable, "-c", program, *arguments]
    process = subprocess.run(line, capture_output=True, text=True, timeout=600)
    return json.loads(process.stdout) if process.returncode == 0 else process.stderr


def test_the_command_line_names_an_algorithm_and_departs_from_it():
    spec = "--config=configs/emoji.py:aesthetic"
    config = read_command_line(
        spec,
        "--config.gradient.renoise=3",
        "--config.algorithm=draft_lv",
        "--config.truncation.k=2",
    )
    assert config["algorithm"] == "draft_lv"
    truncation = config["truncation"]
    assert (truncation["strategy"], truncation["k"], config["gradient"]["renoise"]) == (
        "last",
        2,
        3,
    )
    config = read_command_line(
        spec, "--config.algorithm", "drtune", "--noconfig.gradient.detach_input"
    )
    assert (config["algorithm"], config["truncation"]["strategy"]) == ("drtune", "spaced")
    assert config["gradient"]["detach_input"] is False
    # That of the file is as the file has it.
    config = read_command_line(spec, "--config.algorithm=alignprop")
    assert config["truncation"]["strategy"] == "full"
    error = read_command_line(spec, "--config.algorithm=ddpq")
    assert error.startswith("error: config.algorithm='ddpq' must be one of alignprop, draft, ")


def test_a_file_cannot_smuggle_in_an_unknown_key_or_another_type():
    config = default_config()
    config.train.learning_rat = 1.0
    with pytest.raises(UserError, match="unknown .*learning_rat; did you mean .*learning_rate?"):
        validate(config)
    config = default_config()
    with config.ignore_type():
        config.train.batch_size = "8"
    with pytest.raises(UserError, match='config.train.batch_size="8" must be a whole number'):
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
        check_key(key)
    assert suggestion in str(info.value)


def test_config_file_errors(tmp_path):
    with pytest.raises(UserError, match="config file 'nope.py:aesthetic': no file 'nope.py'"):
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
    assert find_changes(saved, config) == {}
    config.train.num_steps = 7
    assert find_changes(saved, config) == {"train.num_steps": (100, 7)}
    # Of an earlier release, and of a later one.
    del saved["train"]["seed"], saved["lora"]
    saved["loss"]["new"] = 1
    assert find_changes(saved, config) == {"train.num_steps": (100, 7)}
    config.train.seed = 2
    assert find_changes(saved, config)["train.seed"] == (0, 2)

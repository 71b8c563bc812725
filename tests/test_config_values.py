"""Every key of a config with values that no run can have: each is refused in one line, by name."""

import math
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_dict

from alignprop_jax.config import KEYS, default_config, define_config_flag, load_config, validate
from alignprop_jax.errors import UserError

VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**5000,
    -0.5,
    1e-40,
    1e30,
    math.inf,
    -math.inf,
    math.nan,
    1j,
    np.float32(1.0),
    np.zeros(2),
    "",
    "x",
    "nul\0",
    "half \udc80",
    "x" * 10_000,
    b"bytes",
    [],
    ["to_q", 3],
    ("",),
    {},
    {"aesthetic": math.nan},
    {"aesthetic": {"weight": 1.0}},
    {1: 1.0},
    object(),
    print,
]

TEXTS = [
    "",
    " ",
    "x",
    "nan",
    "-inf",
    "1e999",
    "-1",
    "0",
    "3",
    "08",
    "1_000",
    "٣",
    "9223372036854775808",
    "9" * 4000,
    "9" * 5000,
    "true",
    "none",
    "[1, 2",
    "('to_q', 3)",
    "{'aesthetic': 1e999}",
    "{[]: 1}",
    "-" * 3000 + "1",
    "(" * 3000,
    "x" * 5000,
    "nul\0",
    "\udcff",
    "line\nbreak",
    "--config.lora.rank=3",
]


def assert_names(error, key):
    message = str(error)
    # Two keys that do not go together are named by one of them.
    named = (key, "sampler steps") if key == "sampler.num_steps" else (key,)
    assert any(name in message for name in named), message


def is_usable(config):
    """Whether every value is of its kind; only what must fail elsewhere is left."""
    for key in KEYS:
        value = _get(config, key)
        if isinstance(value, float):
            assert math.isfinite(value), key
        assert not isinstance(value, str) or "\0" not in value
    return True


def _get(config, key):
    for name in key.split("."):
        config = config[name]
    return config


@pytest.mark.parametrize("key", KEYS)
def test_values_of_a_config_file(key):
    refused = 0
    for value in VALUES:
        config = default_config()
        *sections, name = key.split(".")
        section = config[sections[0]] if sections else config
        try:
            with config.ignore_type():
                section[name] = value
        except OverflowError:
            continue  # in the user's file, which is blamed
        try:
            validate(config)
        except UserError as error:
            refused += 1
            assert len(str(error)) < 2000
            if isinstance(value, dict) and key != "reward":
                assert "unknown config key" in str(error) or "is missing" in str(error)
            else:
                assert_names(error, key)
        else:
            assert is_usable(config)
    assert refused >= len(VALUES) - 12


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("from alignprop_jax.config import default_config as get_config\n")
    return path


def parse(monkeypatch, *arguments):
    """The config that a program gets from its arguments."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    flag_values = flags.FlagValues()
    holder = define_config_flag(flag_values)
    flag_values(sys.argv)
    validate(holder.value)
    return holder.value


@pytest.mark.parametrize("key", KEYS)
def test_values_of_the_command_line(key, config_file, monkeypatch):
    # A flag that may stand alone takes its value by an equals sign.
    alone = key == "reward" or isinstance(KEYS[key].default, bool)
    for value in TEXTS:
        overrides = ([f"--config.{key}={value}"], [f"-config.{key}", value])
        for override in overrides[: 1 if alone else 2]:
            try:
                config = parse(monkeypatch, f"--config={config_file}", *override)
            except (flags.Error, UserError) as error:
                if not value.startswith("--"):
                    assert_names(error, key)
            else:
                assert is_usable(config)


def test_a_flag_file_acts_as_the_command_line_does(config_file, tmp_path, monkeypatch):
    flag_file = tmp_path / "flags.txt"
    flag_file.write_text("--config.algorithm=draft_k\n# a remark\n--config.truncation.k=2\n")
    file, from_file = f"--config={config_file}", f"--flagfile={flag_file}"
    for arguments in ((file, from_file), (file, "--flagfile", str(flag_file))):
        config = parse(monkeypatch, *arguments)
        assert (config.algorithm, config.truncation.strategy, config.truncation.k) == (
            "draft_k",
            "last",
            2,
        )
    # The last one counts.
    config = parse(monkeypatch, file, from_file, "--config.algorithm=draft")
    assert (config.algorithm, config.truncation.strategy) == ("draft", "full")
    config = parse(monkeypatch, file, "--config.algorithm=draft", from_file)
    assert (config.algorithm, config.truncation.strategy) == ("draft_k", "last")
    # The config itself may stand there, too.
    flag_file.write_text(f"{file}\n--config.algorithm=drtune\n")
    assert parse(monkeypatch, from_file).truncation.strategy == "spaced"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.=1"], "unknown config key config.; known"),
        (["--config"], "--config is given twice"),
        (["--config=other.py"], "--config is given twice"),
        (["--config.algorithm"], "config.algorithm='' must be one of"),
        (["--noconfig.algorithm"], "config.algorithm='' must be one of"),
        (["--noconfig.train.seed"], "Unknown command line flag 'noconfig.train.seed'"),
        (["--config.train=1"], "unknown config key config.train; did you mean"),
        (["--config.reward.aesthetic=1"], "unknown config key config.reward.aesthetic"),
        (["--config.train.seed=1", "--config.train.seed=x"], "config.train.seed=x"),
        (["--flagfile=absent.txt"], "Unable to open flagfile.*absent.txt"),
    ],
)
def test_overrides_that_are_none(arguments, message, config_file, monkeypatch):
    with pytest.raises((flags.Error, UserError), match=message):
        parse(monkeypatch, f"--config={config_file}", *arguments)


@pytest.mark.parametrize(
    "body, message",
    [
        ("import sys; sys.exit(0)", "fails: SystemExit: 0"),
        ("def get_config(", "fails: SyntaxError"),
        ("def get_config(): raise GeneratorExit", "fails: GeneratorExit"),
        ("def get_config(): return get_config()", "fails: RecursionError"),
        ("x = 1", "it has no function get_config"),
        ("get_config = 3", "it has no function get_config"),
        ("def get_config(): return None", "get_config must return a ConfigDict, not NoneType"),
        ("get_config = lambda: 3", "not int"),
        ("from ml_collections import ConfigDict as get_config", "config.algorithm is missing"),
    ],
)
def test_files_that_fail(tmp_path, body, message):
    path = tmp_path / "mine.py"
    path.write_text(body)
    with pytest.raises(UserError, match=f"^config file '{path}'.*{message}"):
        load_config(str(path))


def test_what_a_file_may_not_return(config_file):
    for change in (
        lambda config: ConfigDict({**config, "train": 5}),
        lambda config: config_dict.FrozenConfigDict(config),
        lambda config: ConfigDict({**config, "model": config_dict.required_placeholder(str)}),
    ):
        module = config_file.with_name("changed.py")
        module.write_text("def get_config():\n    return change()\n")
        with pytest.raises(UserError, match="changed.py"):
            _load_with(module, lambda change=change: change(default_config()))


def _load_with(path, change):
    import builtins

    builtins.change = change
    try:
        return load_config(str(path))
    finally:
        del builtins.change


@pytest.mark.parametrize("strategy, key", [("fixed", "start"), ("uniform", "min")])
def test_a_truncation_that_trains_no_step_is_refused(strategy, key):
    config = default_config()
    config.truncation.strategy = strategy
    config.truncation.update({key: 50, "max": 50})
    with pytest.raises(UserError, match=f"trains none of the 50 .*config.truncation.{key}"):
        validate(config)
    config.truncation.update({key: 49})
    validate(config)

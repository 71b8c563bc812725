"""Every flag of the programs with values that none can have: refused in one line, by name."""

import math
import runpy
import sys

import pytest
from absl import flags

from alignprop_jax.benchmark import first_step
from alignprop_jax.errors import UserError
from alignprop_jax.inputs.flag_types import define_number
from alignprop_jax.lora.mixing import parse_timesteps
from alignprop_jax.planning.topology import Topology
from alignprop_jax.trials.methods import Method

VALUES = [
    "",
    " ",
    "x",
    "nan",
    "NaN",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "0",
    "1",
    "08",
    "1.5",
    "1e5",
    "0x10",
    "٣",
    "2147483648",
    "9223372036854775808",
    "9" * 4000,
    "9" * 5000,
    "true",
    "[1, 2",
    "\udcff",
    "line\nbreak",
]

PROGRAMS = {
    "sample": ["--model=m", "--prompts=p", "--output=o"],
    "evaluate": ["--config=configs/emoji.py:aesthetic", "--workdir=w"],
    "sweep": ["--config=configs/emoji.py:aesthetic", "--workdir=w", "--lora=l"],
    "compare": ["--workdir=w"],
    "plan": ["--config=configs/emoji.py:aesthetic", "--topology=v5e:2x2"],
    "benchmark": ["--model=m"],
    "merge": ["--model=m", "--output=o"],
}


@pytest.fixture
def define(monkeypatch):
    """Defines the flags of a program, as its start does; forgets them afterwards."""
    before = set(flags.FLAGS)

    def run(program, arguments):
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.setattr("alignprop_jax.errors.run_program", lambda main: None)
        monkeypatch.delitem(sys.modules, f"alignprop_jax.{program}", raising=False)
        runpy.run_module(f"alignprop_jax.{program}", run_name="__main__")
        return set(flags.FLAGS) - before

    yield run
    flags.FLAGS.unparse_flags()
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.mark.parametrize("program", PROGRAMS)
def test_values_of_flags(program, define):
    required = PROGRAMS[program]
    names = define(program, required) - {"config"}
    assert names
    for name in names:
        for value in VALUES:
            flags.FLAGS.unparse_flags()
            argument = f"--{name}={value}"
            try:
                others = [flag for flag in required if not flag.startswith(f"--{name}=")]
                flags.FLAGS([program, *others, argument])
            except flags.Error as error:
                assert name in str(error)
                continue
            parsed = flags.FLAGS[name].value
            if isinstance(parsed, float):
                assert math.isfinite(parsed)
            if isinstance(parsed, int):
                assert parsed < 2**32


def test_texts_that_are_none(define):
    required = PROGRAMS["sample"]
    define("sample", required)
    for argument in ("--negative_prompt=\udcff", "--output="):
        flags.FLAGS.unparse_flags()
        with pytest.raises(flags.Error, match=argument.partition("=")[0]):
            flags.FLAGS(["sample", *required, argument])


def test_a_number_lies_between_its_bounds():
    flag_values = flags.FlagValues()
    for argument in ("nan", "inf", "0.9", "2.1", "x"):
        define = define_number("share", 1.0, "a share", 1, 2, flag_values)
        with pytest.raises(flags.Error, match=f"--share={argument}"):
            flag_values(["program", f"--share={argument}"])
        delattr(flag_values, "share")
    define = define_number("share", None, "a share", 1, 2, flag_values)
    flag_values(["program"])
    assert define.value is None
    flag_values(["program", "--share=2"])
    assert define.value == 2.0


@pytest.mark.parametrize(
    "text",
    ["", "5", "5:", ":5", "5:6", "-1:-2", "1e3:0", "٣:٣", "9999999:0", "9" * 5000 + ":0", "1:0\n"],
)
def test_ranges_of_timesteps_that_are_none(text):
    with pytest.raises(UserError, match="--lora_timesteps is .*; give HIGH:LOW"):
        parse_timesteps(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "v5e",
        "v5e:",
        "v5e:0x4",
        "v5e:4",
        "v5e:٣x٣",
        "v5e-0",
        "v5e-" + "9" * 5000,
        "v5e:2x2\n",
    ],
)
def test_topologies_that_are_none(text):
    with pytest.raises(UserError, match="topology '"):
        Topology.parse(text)


@pytest.mark.parametrize("case", ["", "x", "-1", "21", "1.0", "٣", "9" * 5000])
def test_cases_that_are_none(case):
    with pytest.raises(
        UserError, match=f"--cases={case[:9]}.*: give sample, or a first step of 0 to 20"
    ):
        first_step(case, 20)
    assert (first_step("sample", 20), first_step("20", 20)) == (None, 20)


@pytest.mark.parametrize(
    "setting",
    [
        "train.seed",
        "=1",
        "train=1",
        "train.seed=x",
        "train.seed=9223372036854775808",
        "train.learning_rate=1e999",
        "train.learning_rate=" + "9" * 400,
        "train.learning_rate=nan",
        "lora.targets=1",
        "reward={'a':{}}",
        "reward=" + "-" * 3000 + "1",
        "algorithm=none",
    ],
)
def test_settings_of_methods_that_are_none(setting):
    with pytest.raises(UserError):
        Method.parse(f"alignprop {setting}").config("configs/emoji.py:aesthetic", {})

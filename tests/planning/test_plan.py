"""The program, with the TPU's compiler, on the smallest model."""

import importlib.util
import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="there is no TPU compiler: pip install libtpu",
)


def plan(config, topology, *arguments):
    command = [sys.executable, "-m", "alignprop_jax.plan", f"--config={config}"]
    return subprocess.run(
        [*command, f"--topology={topology}", *arguments], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def numbers(nano_config):
    arguments = ("--config.train.batch_size=16", "--config.train.microbatch_size=8")
    process = plan(nano_config, "v5litepod-4", "--search=False", *arguments)
    assert process.returncode == 0, process.stderr
    return process.stdout, json.loads(process.stdout.splitlines()[-1])


def test_a_plan_ends_with_its_numbers(numbers):
    table, plan = numbers
    assert "memory of a chip" in table and "share of peak" in table
    assert (plan["topology"], plan["chips"], plan["fits"]) == ("v5e:2x2", 4, True)
    assert (plan["images_per_chip"], plan["images_per_step"]) == (2, 16)
    assert plan["hbm_gb_per_chip"] == pytest.approx(
        sum(plan["hbm_gb_per_chip_of"].values()), abs=2e-3
    )
    assert plan["seconds_per_step"] == pytest.approx(sum(plan["seconds_per_step_of"].values()))
    assert plan["flops_per_step"] == pytest.approx(
        plan["share_of_peak"] * plan["seconds_per_step"] * 4 * 197e12
    )
    assert plan["compile_seconds"] > 0


def test_collectives_are_the_gradient_of_the_factors_and_scalars(numbers, nano_config):
    """Which are exchanged once an update, however many microbatches it has."""
    from alignprop_jax.config import load_config
    from alignprop_jax.lora.factors import count_parameters
    from alignprop_jax.runs.experiment import load_experiment
    from alignprop_jax.runs.train_step import create_state

    config = load_config(str(nano_config))
    state = create_state(config, load_experiment(config))
    size = 4 * count_parameters(state.lora)
    assert size <= numbers[1]["collective_bytes_per_chip"] <= size + 64


@pytest.mark.slow
def test_memory_alone_is_that_of_the_whole_program(numbers, nano_config):
    """The compiler is ended before it writes code, from which nothing of this would change."""
    arguments = ("--config.train.batch_size=16", "--config.train.microbatch_size=8")
    process = plan(nano_config, "v5litepod-4", "--notiming", "--search=False", *arguments)
    assert process.returncode == 0, process.stderr
    whole, early = dict(numbers[1]), json.loads(process.stdout.splitlines()[-1])
    whole_memory, early_memory = (n.pop("hbm_gb_per_chip_of") for n in (whole, early))
    del whole_memory["program"]
    assert early_memory == pytest.approx(whole_memory, abs=2e-4)  # rounded to 1e-4 GiB
    assert "seconds a step" not in process.stdout
    for name, value in early.items():
        if name in ("seconds_per_step", "seconds_per_step_of", "images_per_second"):
            assert value is None
        elif name == "share_of_peak":
            assert value is None
        elif name not in ("compile_seconds", "hbm_gb_per_chip"):
            assert value == whole[name], name


def test_more_chips_than_images_are_refused(nano_config):
    process = plan(nano_config, "v5e:4x4")
    assert process.returncode == 1
    assert "must be a multiple of the number of devices, 16" in process.stderr

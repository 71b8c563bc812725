import os
import subprocess
import sys

import pytest

from alignprop_jax.config import default_config
from alignprop_jax.devices.cpu_devices import num_devices
from alignprop_jax.runs.settings import at_a_time

COUNT = """
from alignprop_jax.devices import cpu_devices
import jax
cpu_devices.cpu_flags = CPU.split
cpu_devices.use_cores(samples=4, fsdp=1)
print(len(jax.devices()), os.environ["PJRT_NPROC"])
cpu_devices.use_cores(samples=4, fsdp=1)
"""


@pytest.mark.parametrize(
    "batch, microbatch, fsdp, cores, expected",
    [(8, 0, 1, 2, 2), (8, 0, 1, 6, 4), (9, 0, 1, 2, 1), (8, 2, 1, 8, 2), (16, 0, 2, 7, 4)],
)
def test_the_images_in_memory_divide_among_the_devices(batch, microbatch, fsdp, cores, expected):
    config = default_config()
    config.train.batch_size, config.train.microbatch_size = batch, microbatch
    config.mesh.fsdp = fsdp
    assert num_devices(*at_a_time(config), cores) == expected


def test_ddpo_s_minibatches_do_too():
    config = default_config()
    config.algorithm, config.train.batch_size, config.rollouts.minibatches = "ddpo", 8, 4
    assert num_devices(*at_a_time(config), 8) == 2


@pytest.mark.parametrize(
    "cpu, environment, expected",
    [
        ("avx2", {}, "2 3"),
        ("avx2", {"JAX_NUM_CPU_DEVICES": "3"}, "3 4"),
        ("avx2", {"JAX_NUM_CPU_DEVICES": "1"}, "1 2"),
        ("avx2", {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, "4 5"),
        ("avx2", {"PJRT_NPROC": "8"}, "2 8"),
        ("avx2 avx512f", {}, "2 2"),
        ("avx2 avx512f", {"JAX_NUM_CPU_DEVICES": "3"}, "3 3"),
        ("avx2 avx512f", {"JAX_NUM_CPU_DEVICES": "1"}, "1 2"),
    ],
)
def test_cores_are_devices_with_a_thread_to_spare_where_it_is_needed(cpu, environment, expected):
    script = f"CPU = {cpu!r}; import os; os.sched_getaffinity = lambda _: {{0, 1}}" + COUNT
    process = subprocess.run(
        [sys.executable, "-c", script],
        env={"JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )
    assert process.stdout.strip() == expected, process.stderr


SAMPLES = """
import numpy as np
from alignprop_jax.config import load_config
from alignprop_jax.devices.cpu_devices import use_cores
from alignprop_jax.evaluation.evaluator import make_evaluator
from alignprop_jax.runs.experiment import UNSEEN, load_experiment
from alignprop_jax.runs.settings import at_a_time

config = load_config("configs/emoji.py:jpeg_compress")
config.reward = "jpeg_compress"
use_cores(*at_a_time(config))
evaluator = make_evaluator(config, load_experiment(config))
split = evaluator.experiment.splits[UNSEEN]
first, *others = (evaluator.evaluate(None, split, limit=16).scores["reward"] for _ in range(12))
for again in others:
    np.testing.assert_array_equal(again, first)
"""


@pytest.mark.slow
def test_every_sample_is_the_same_again():
    """With $PJRT_NPROC=2 on a CPU without AVX-512, it is another in half of the evaluations."""
    script = "import os; os.sched_getaffinity = lambda _: {0, 1}" + SAMPLES
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr

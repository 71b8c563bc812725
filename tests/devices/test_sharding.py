"""One train step on meshes of virtual devices: its numbers, its memory and what it sends."""

import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.devices import sharding
from alignprop_jax.errors import UserError
from alignprop_jax.nn.attention_functions import attend

COLLECTIVE = re.compile(
    r" = (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-[a-z]+)(?:-start)?\("
)
ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")


def run_steps(config, folder, *meshes, algorithm="alignprop"):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-m", "tests.steps_on_meshes", config, folder, algorithm, *meshes],
        env={**os.environ, "XLA_FLAGS": flags},
        check=True,
    )
    return {mesh: json.loads((folder / f"{mesh}.json").read_text()) for mesh in meshes}


@pytest.fixture(scope="module")
def steps(nano_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    return folder, run_steps(nano_config, folder, "1_1", "8_1", "8_2")


def assert_same_step(folder, scalars, meshes, atol=1e-5):
    expected = np.load(folder / "1_1.npy")
    for mesh in meshes:
        np.testing.assert_allclose(np.load(folder / f"{mesh}.npy"), expected, atol=atol)
        for name in ("loss", "reward_mean", "reward_std", "grad_norm"):
            # The advantages of a batch cancel in the loss of DDPO.
            wanted = scalars["1_1"][name]
            np.testing.assert_allclose(scalars[mesh][name], wanted, rtol=1e-5, atol=1e-6)


def test_a_step_is_the_same_on_eight_devices(steps):
    folder, scalars = steps
    # The gradient that is compared is far above the tolerance.
    assert scalars["1_1"]["grad_norm"] > 1e-2
    assert_same_step(folder, scalars, ("8_1", "8_2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm, atol",
    # Log-probabilities divide by the variance of a step, and so magnify how sampling was rounded,
    # which differs between processors: by up to 2e-5, of a gradient of norm 0.2.
    [("ddpo", 1e-4), ("rwr", 1e-5)],
)
def test_so_is_one_without_the_gradient_of_the_reward(nano_config, tmp_path, algorithm, atol):
    scalars = run_steps(nano_config, tmp_path, "1_1", "4_1", algorithm=algorithm)
    assert scalars["1_1"]["grad_norm"] > 1e-3
    assert_same_step(tmp_path, scalars, ["4_1"], atol)


@pytest.mark.slow
def test_a_step_is_the_same_on_every_mesh(steps, nano_config):
    folder, scalars = steps
    meshes = ("2_1", "4_1", "2_2", "4_2")
    assert_same_step(folder, scalars | run_steps(nano_config, folder, *meshes), meshes)


def test_devices_exchange_the_gradient_once_and_scalars(steps):
    folder, scalars = steps
    sent = list(find_collectives((folder / "8_1.hlo").read_text()))
    # Nothing in a loop: not over denoising steps, not over microbatches.
    assert {computation for computation, _ in sent} == {"ENTRY"}
    gradient = scalars["8_1"]["lora_bytes"]
    assert gradient <= sum(size for _, size in sent) <= gradient + 100


def test_fsdp_splits_the_weights_and_never_gathers_them_all(steps):
    folder, scalars = steps
    whole, half = scalars["8_1"], scalars["8_2"]
    assert half["lora_bytes"] == whole["lora_bytes"]
    # Biases and norms, and a kernel of an odd shape, are not split.
    assert 0.5 < half["weight_bytes"] / whole["weight_bytes"] < 0.6
    # What is gathered before the loop over denoising steps stays whole until its end.
    sent = find_collectives((folder / "8_2.hlo").read_text())
    before = sum(size for computation, size in sent if computation == "ENTRY")
    assert before < 0.01 * whole["weight_bytes"]


def find_collectives(program):
    """Yields the computation and the bytes of every exchange between devices."""
    sizes = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
    computation = None
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.split()[0]
        collective = COLLECTIVE.search(line)
        if collective:
            arrays = ARRAY.findall(collective[1])
            lengths = [
                [int(length) for length in shape.split(",") if length] for _, shape in arrays
            ]
            yield (
                computation,
                sum(
                    sizes[dtype] * math.prod(shape)
                    for (dtype, _), shape in zip(arrays, lengths, strict=True)
                ),
            )


def test_kernels_are_split_on_their_longest_axis_that_can_be():
    mesh = jax.sharding.AbstractMesh((2, 4), sharding.DATA_AXES)
    weights = {
        "conv": jnp.zeros((3, 3, 8, 16)),
        "dense": jnp.zeros((12, 6)),
        "odd": jnp.zeros((7, 5)),
        "bias": jnp.zeros(16),
        "scalar": jnp.zeros(()),
        # Each device has its part of every layer, and not some of the layers.
        "layers.*": {"dense": jnp.zeros((16, 12, 6)), "bias": jnp.zeros((4, 4))},
    }
    specs = jax.tree.map(lambda x: tuple(x.spec), sharding.of_frozen(weights, mesh))
    assert specs == {
        "conv": (None, None, None, "fsdp"),
        "dense": ("fsdp", None),
        "odd": (),
        "bias": (),
        "scalar": (),
        "layers.*": {"dense": (None, "fsdp", None), "bias": ()},
    }


def test_attention_of_each_device_is_that_of_all():
    mesh = sharding.make_mesh()
    query, key, value = (
        jax.random.normal(jax.random.key(seed), (2, tokens, 2, 4))
        for seed, tokens in enumerate((6, 5, 5))
    )
    split = sharding.on_each_device(attend, mesh)
    expected = attend(query, key, value)
    np.testing.assert_allclose(split(query, key, value), expected, rtol=1e-6)

    # Within a computation that is split already, too.
    def attended(whole, batch):
        return jnp.zeros(()), split(*batch)

    _, rows = sharding.split_batch(mesh)(attended)((), (query, key, value))
    np.testing.assert_allclose(rows, expected, rtol=1e-6)


def test_keys_and_arrays_are_put_and_gathered():
    mesh = sharding.make_mesh()
    tree = {"array": np.arange(3.0), "key": jax.random.key(1)}
    there = sharding.put(tree, sharding.replicated(mesh))
    assert there["array"].sharding == sharding.replicated(mesh)
    assert jnp.array_equal(jax.random.key_data(there["key"]), jax.random.key_data(tree["key"]))
    np.testing.assert_array_equal(sharding.gather(there["array"]), tree["array"])


def test_groups_of_devices_must_come_out_even():
    with pytest.raises(UserError, match="config.mesh.fsdp=3 must divide .* devices, 1"):
        sharding.make_mesh(3)

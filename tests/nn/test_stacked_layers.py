"""Layers in a loop, against the same one by one; their weights and factors, against NumPy."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignprop_jax.errors import UserError
from alignprop_jax.loading.weights import load_params, save_params, to_state_dict
from alignprop_jax.lora.factors import adapt, init_lora, linear_shapes, merge_lora
from alignprop_jax.nn.layers import Linear
from alignprop_jax.nn.stacked_layers import EVERY, run_layers, single_layers

NUMBER, WIDTH = 3, 4


class Network(nn.Module):
    """x becomes x + tanh(x W + b) * gate, in every layer."""

    @nn.compact
    def __call__(self, x, gate):
        return run_layers(
            lambda layer, x, gate: x + jnp.tanh(layer(x)) * gate,
            Linear(WIDTH, name=f"blocks{EVERY}"),
            NUMBER,
            x,
            gate,
        )


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((NUMBER, WIDTH, WIDTH)).astype(np.float32)
    bias = rng.standard_normal((NUMBER, WIDTH)).astype(np.float32)
    return {"blocks.*": {"kernel": kernel, "bias": bias}}


def in_numpy(kernels, biases, x, gate):
    for kernel, bias in zip(kernels, biases, strict=True):
        x = x + np.tanh(x @ kernel + bias) * gate
    return x


def random_factors(rank, seed):
    rng = np.random.default_rng(seed)
    return {"down": rng.standard_normal((WIDTH, rank)), "up": rng.standard_normal((rank, WIDTH))}


def test_layers_run_in_the_order_of_their_weights(params):
    x, gate = np.random.default_rng(1).standard_normal((2, 5, WIDTH)).astype(np.float32)
    actual = Network().apply({"params": params}, x, gate)
    expected = in_numpy(*params["blocks.*"].values(), x, gate)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_initial_weights_are_of_one_layer_and_differ_between_them(params):
    x = jnp.ones((1, WIDTH))
    drawn = Network().init(jax.random.key(0), x, x)["params"]
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)
    kernel = drawn["blocks.*"]["kernel"]
    assert 0.5 < float(jnp.abs(kernel).max()) * WIDTH**0.5 <= 1
    assert not np.allclose(kernel[0], kernel[1])


def test_factors_of_some_layers_and_of_other_ranks_change_these_layers(params):
    """Each layer has its own factors in the tree, or none."""
    lora = {"blocks.0": random_factors(2, seed=1), "blocks.2": random_factors(3, seed=2)}
    change = np.zeros((NUMBER, WIDTH, WIDTH))
    for i in (0, 2):
        change[i] = lora[f"blocks.{i}"]["down"] @ lora[f"blocks.{i}"]["up"]
    x, gate = np.random.default_rng(1).standard_normal((2, 5, WIDTH)).astype(np.float32)
    kernel, bias = params["blocks.*"]["kernel"], params["blocks.*"]["bias"]
    expected = in_numpy(kernel + change, bias, x, gate)
    lora = jax.tree.map(jnp.float32, lora)

    actual = Network().apply(adapt(params, lora), x, gate)
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    merged = merge_lora(params, lora)
    np.testing.assert_allclose(merged["blocks.*"]["kernel"], kernel + change, atol=1e-5)

    # Zeros that stand for a layer without factors are nobody's to train.
    gradient = jax.grad(lambda lora: Network().apply(adapt(params, lora), x, gate).sum())(lora)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, lora)


def test_every_layer_is_adapted_under_its_own_name(params):
    names = [f"blocks.{i}" for i in range(NUMBER)]
    assert linear_shapes(params) == {name: ((name,), WIDTH, WIDTH) for name in names}
    assert list(init_lora(jax.random.key(0), params, targets=("blocks.1",))) == ["blocks.1"]


def test_single_layers_of_a_path():
    path = ("encoder", "layers.*", "mlp", "kernel")
    assert single_layers(path, (2, 5, 7)) == [
        (("encoder", "layers.0", "mlp", "kernel"), (5, 7)),
        (("encoder", "layers.1", "mlp", "kernel"), (5, 7)),
    ]
    assert single_layers(("conv", "kernel"), (2, 5)) == [(("conv", "kernel"), (2, 5))]


def test_files_have_a_tensor_a_layer(params, tmp_path):
    path = tmp_path / "model.safetensors"
    save_params(params, path)
    stored = load_file(path)
    assert len(stored) == 2 * NUMBER
    for i in range(NUMBER):
        kernel = params["blocks.*"]["kernel"][i]
        np.testing.assert_array_equal(stored[f"blocks.{i}.weight"], kernel.T)
    shapes = jax.eval_shape(lambda: params)
    loaded = load_params(shapes, path)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

    del stored["blocks.1.weight"]
    save_file(stored, path)
    with pytest.raises(UserError, match=r"needs tensor blocks.1.weight \[4, 4\], missing here"):
        load_params(shapes, path)


def test_of_a_tensor_in_two_files_the_index_tells_which_counts(params, tmp_path):
    tensors = {name: np.ascontiguousarray(x) for name, x in to_state_dict(params).items()}
    shared = "blocks.1.weight"
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({shared: tensors[shared] + 1}, tmp_path / "b.safetensors")
    shapes = jax.eval_shape(lambda: params)
    for file, more in (("a", 0), ("b", 1)):
        index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
        index["weight_map"][shared] = f"{file}.safetensors"
        index["weight_map"]["of.b"] = "b.safetensors"
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        loaded = load_params(shapes, tmp_path / "model.safetensors.index.json")
        wanted = tensors[shared].T + more
        np.testing.assert_array_equal(loaded["blocks.*"]["kernel"][1], wanted)

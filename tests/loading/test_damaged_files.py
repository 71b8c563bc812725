"""Files of weights that are none, or lie about what is in them: one line each, and no memory."""

import json
import os
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.load import open_model
from alignprop_jax.loading import tensor_files
from alignprop_jax.loading.open_clip import load_open_clip
from alignprop_jax.loading.tensor_files import read_shapes, read_tensors
from alignprop_jax.loading.weights import load_params
from alignprop_jax.rewards.aesthetic import load_head

TREE = {"proj": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)}}


def write_header(path, header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", length or len(header)) + header + data)


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refused(path, read=lambda path: list(read_tensors(path))):
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    "header, data, length",
    [
        ({}, b"", 2**63),
        ({}, b"", 100),
        (b"[" * 100_000, b"", None),
        ({"a": entry([-1], 0, 4)}, b"abcd", None),
        ({"a": entry([2**40, 2**40], 0, 4)}, b"abcd", None),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"abcd", None),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"abcd" * 3, None),
        ({"a": entry([0, 2**62], 0, 0)}, b"", None),
        ({"a": entry([1] * 70, 0, 4)}, b"abcd", None),
        ({"__metadata__": {"a": 1}}, b"", None),
    ],
)
def test_headers_that_lie(tmp_path, header, data, length):
    path = tmp_path / "model.safetensors"
    write_header(path, header, data, length)
    assert "truncated, or not a safetensors file" in (message := refused(path)) or "a of shape" in (
        message
    )


def test_a_tensor_of_holes_takes_no_memory(tmp_path):
    path = tmp_path / "model.safetensors"
    write_header(path, {"a": entry([2**31], 0, 2**33)})
    os.truncate(path, path.stat().st_size + 2**33)
    assert "tensor a of shape [2147483648] is larger than any model's" in refused(path)


def test_more_tensors_than_any_model_has(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_MAX_TENSORS", 1)
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(1), "b": np.ones(1)}, path)
    assert refused(path).endswith("holds more than 1 tensors")


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "json"])
def test_what_is_no_file(tmp_path, suffix):
    if suffix == "bin":
        pytest.importorskip("torch")
    path = tmp_path / f"model.{suffix}"
    assert refused(path).endswith("no such file")
    path.mkdir()
    assert refused(path).endswith("a file belongs here, and this is none")
    path.rmdir()
    os.mkfifo(path)
    assert refused(path).endswith("a file belongs here, and this is none")
    path.unlink()
    path.symlink_to(path)
    assert "cannot be read (Too many levels of symbolic links)" in refused(path)
    path.unlink()
    path.touch()
    assert "truncated" in (message := refused(path)) or "cannot be read as a" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64"])
def test_weights_that_are_not_finite_are_named(tmp_path, value, stored):
    path = tmp_path / "model.safetensors"
    weight = np.arange(6, dtype=stored).reshape(3, 2)
    save_file({"proj.weight": weight}, path)
    np.testing.assert_array_equal(load_params(TREE, path)["proj"]["kernel"], weight.T)
    weight[2, 0] = value
    save_file({"proj.weight": weight}, path)
    for dtype in ("float32", "bfloat16"):
        message = refused(path, lambda path, dtype=dtype: load_params(TREE, path, dtype))
        assert f"proj.weight holds numbers that are not finite in {dtype}" in message


def test_weights_that_the_type_in_use_cannot_hold_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"proj.weight": np.full((3, 2), 1e300)}, path)
    assert "proj.weight holds numbers that are not finite in float32" in refused(
        path, lambda path: load_params(TREE, path)
    )


@pytest.mark.parametrize("stored", ["int8", "int64", "bool", "complex64"])
def test_weights_that_are_no_floats_are_named(tmp_path, stored):
    path = tmp_path / "model.safetensors"
    save_file({"proj.weight": np.ones((3, 2), stored)}, path)
    assert f"tensor proj.weight is stored as {stored}, where floating-point" in refused(
        path, lambda path: load_params(TREE, path)
    )


def test_a_tensor_that_is_there_twice_is_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    names = ("a.safetensors", "b.safetensors")
    index.write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    for name in names:
        save_file({"proj.weight": np.ones((3, 2), np.float32)}, tmp_path / name)
    assert "tensor proj.weight is there twice" in refused(
        index, lambda path: load_params(TREE, path)
    )


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "has no tensors"),
        ({"layers.0.weight": np.ones((1, 2))}, "needs both a weight and a bias"),
        ({"layers.0.weight": np.ones(2), "layers.0.bias": np.ones(1)}, "weight of shape [2]"),
        ({"layers.0.weight": np.array(1.0), "layers.0.bias": np.ones(1)}, "weight of shape []"),
        ({"layers.0.weight": np.ones((1, 2), np.int32)}, "something else than finite numbers"),
        ({"layers.0.weight": np.full((1, 2), np.nan)}, "something else than finite numbers"),
        ({"layers.00.weight": np.ones((1, 2))}, "is not named layers.N.weight"),
        ({f"layers.{'9' * 5000}.weight": np.ones((1, 2))}, "is not named layers.N.weight"),
    ],
)
def test_heads_that_are_none(tmp_path, tensors, message):
    path = tmp_path / "head.safetensors"
    save_file(tensors, path)
    assert message in refused(path, load_head)


@pytest.mark.parametrize("name", ["token_embedding.weight", "visual.conv1.weight"])
@pytest.mark.parametrize("shape", [(), (0,), (4,), (0, 0, 0), (3, 7, 2, 2)])
def test_an_open_clip_of_other_shapes(tmp_path, name, shape):
    path = tmp_path / "clip.safetensors"
    layers = {
        f"{tower}transformer.resblocks.0.{leaf}": np.ones(size, np.float32)
        for tower in ("", "visual.")
        for leaf, size in {"mlp.c_fc.weight": (16, 8), "attn.in_proj_weight": (24, 8)}.items()
    }
    tensors = {
        **layers,
        "token_embedding.weight": np.ones((11, 8), np.float32),
        "positional_embedding": np.ones((5, 8), np.float32),
        "visual.positional_embedding": np.ones((5, 8), np.float32),
        "visual.conv1.weight": np.ones((8, 3, 4, 4), np.float32),
        "visual.proj": np.ones((8, 4), np.float32),
    }
    save_file(tensors, path)
    assert "the model needs tensors" in refused(path, lambda path: load_open_clip(path, 2, 2))
    assert "hidden_size=8 is not supported; it must be divisible" in str(
        refused(path, lambda path: load_open_clip(path, 3, 2)).replace("[8]", "8")
    )
    save_file({**tensors, name: np.ones(shape, np.float32)}, path)
    refused(path, lambda path: load_open_clip(path, 2, 2))
    assert read_shapes(path)[name] == shape


@pytest.mark.parametrize(
    "name", ["", "x" * 5000, "nul\0byte", "~nobody/model", "~\ud800", "a:b", ":", "./folder:"]
)
def test_names_of_no_model(name):
    with pytest.raises(UserError, match="no such folder or file; a model is"):
        open_model(name)


def test_a_variant_without_a_name(tmp_path):
    with pytest.raises(UserError, match="no such folder or file; a model is"):
        open_model(f"{tmp_path}:")

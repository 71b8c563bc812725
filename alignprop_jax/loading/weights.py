"""Parameter trees from files of weights: names, layouts, and strict reading.

Torch stores a linear kernel as [out, in] and a convolution as [out, in, height, width]; the
modules here hold [in, out] and [height, width, in, out]. The name of a tensor is its path in the
tree joined by dots, the leaf renamed to `weight`.
"""

import math
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding

from alignprop_jax.errors import UserError
from alignprop_jax.loading.tensor_files import read_tensors, write_safetensors

ParamTree = Mapping[str, Any]

_TORCH_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_KERNEL_AXES_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_KERNEL_AXES_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}
# Rows that are transposed at a time, and bytes.
_BLOCK, _ALIGNMENT = 32, 64
# More of them would hold more tensors than the bound on memory has room for.
_MAX_THREADS = 4
# Buffers that older files carry beside the parameters.
_BUFFERS = ("position_ids",)
# What other releases of diffusers and transformers call some layers, and the name here.
_OTHER_NAMES = (
    (".query.", ".to_q."),
    (".key.", ".to_k."),
    (".value.", ".to_v."),
    (".proj_attn.", ".to_out.0."),
)


def torch_name(path: Sequence[str]) -> str:
    """The name in a state dict of the parameter at `path`."""
    return ".".join([*path[:-1], _TORCH_LEAVES.get(path[-1], path[-1])])


def to_torch_layout(path: Sequence[str], array: np.ndarray) -> np.ndarray:
    """The array of the parameter at `path` with its axes in the order of a state dict."""
    return array.transpose(_KERNEL_AXES_TO_TORCH[array.ndim]) if path[-1] == "kernel" else array


def from_torch_layout(path: Sequence[str], array: np.ndarray, dtype: Any) -> np.ndarray:
    """A copy of the inverse of `to_torch_layout`, of another type.

    It begins where XLA's CPU client takes an array as it is, so that no further copy is made.
    """
    axes = _KERNEL_AXES_FROM_TORCH[array.ndim] if path[-1] == "kernel" else range(array.ndim)
    copy = _empty_aligned([array.shape[axis] for axis in axes], np.dtype(dtype))
    if path[-1] != "kernel":
        copy[...] = array
        return copy
    # What is torch's first axis is our last one. Block by block, both stay in the cache.
    for start in range(0, len(array), _BLOCK):
        block = array[start : start + _BLOCK].astype(dtype, copy=False)
        copy[..., start : start + _BLOCK] = block.transpose(axes)
    return copy


def _empty_aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def save_params(
    tree: ParamTree,
    path: str | Path,
    dtype: Any = np.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a parameter tree as the safetensors file that diffusers and transformers read.

    Args:
        tree: nested dicts of arrays, as in a module's "params".
        path: the file; its folder is made. A file that is there is replaced at once, never half.
        dtype: floating type of the stored tensors.
        metadata: further entries of the file's header.
    """
    tensors = {
        torch_name(keys): to_torch_layout(keys, np.asarray(leaf, dtype))
        for keys, leaf in flatten_dict(tree).items()
    }
    write_safetensors(tensors, path, metadata)


def load_params(abstract: ParamTree, path: str | Path, dtype: Any = np.float32) -> ParamTree:
    """Fills an abstract parameter tree from a file of weights, a few tensors at a time.

    Args:
        abstract: the tree a module expects: nested dicts of anything with a shape. Where it has a
            sharding, that is how the array lies on the devices; otherwise, on the first one.
        path: as for `read_tensors`.
        dtype: floating type of the returned arrays, whatever the file's.

    Returns:
        A tree of jax arrays, shaped as `abstract`.

    Raises:
        UserError: as for `read_tensors`; or a tensor is missing, unexpected or of another shape.
            The message names the tensor, and both shapes.
    """
    return fill_params(abstract, read_tensors(path), path, dtype)


def fill_params(
    abstract: ParamTree,
    tensors: Iterable[tuple[str, np.ndarray]],
    source: str | Path,
    dtype: Any = np.float32,
) -> ParamTree:
    """Fills an abstract parameter tree from tensors by name, in torch's layout.

    Returns and raises as `load_params`; `source` is what messages call the origin of the tensors.
    """
    expected = flatten_dict(abstract)
    paths = {torch_name(keys): keys for keys in expected}
    leaves: dict[tuple[str, ...], Future[jax.Array]] = {}
    unexpected = []
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads) as pool:
        started: deque[Future[jax.Array]] = deque()
        for name, tensor in tensors:
            keys = paths.get(_current_name(name, paths))
            if keys is not None:
                _check_shape(source, name, tensor, _torch_shape(keys, expected[keys].shape))
                sharding = getattr(expected[keys], "sharding", None)
                leaves[keys] = pool.submit(_place, keys, tensor, dtype, sharding)
                started.append(leaves[keys])
            elif name.rsplit(".")[-1] not in _BUFFERS:
                unexpected.append((name, tensor.shape))
            # Nothing of it stays while others are read.
            del tensor
            if len(started) == num_threads:
                started.popleft().result()
    missing = [
        (name, _torch_shape(keys, expected[keys].shape))
        for name, keys in paths.items()
        if keys not in leaves
    ]
    if missing:
        raise UserError(f"{source}: the model needs {_listing(missing)}, missing here")
    if unexpected:
        raise UserError(f"{source}: the model has no place for {_listing(unexpected)}, found here")
    return unflatten_dict({keys: leaf.result() for keys, leaf in leaves.items()})


def _place(
    keys: Sequence[str], tensor: np.ndarray, dtype: Any, sharding: Sharding | None
) -> jax.Array:
    array = from_torch_layout(keys, tensor, dtype)
    if sharding is None:
        return jax.device_put(array).block_until_ready()
    placed = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return placed.block_until_ready()


def _check_shape(source: str | Path, name: str, tensor: np.ndarray, wanted: tuple) -> None:
    if tensor.shape != wanted:
        raise UserError(
            f"{source}: tensor {name} has shape {list(tensor.shape)}, "
            f"the model needs {list(wanted)}"
        )


def _torch_shape(keys: Sequence[str], shape: tuple) -> tuple:
    axes = _KERNEL_AXES_TO_TORCH[len(shape)] if keys[-1] == "kernel" else range(len(shape))
    return tuple(shape[axis] for axis in axes)


def _current_name(name: str, known: Mapping[str, Any]) -> str:
    for old, new in _OTHER_NAMES:
        if name not in known:
            name = name.replace(old, new)
    # transformers 5 leaves the prefix of a text tower that stands alone out of the file.
    return name if name in known else f"text_model.{name}"


def _listing(tensors: Sequence[tuple[str, tuple]], limit: int = 3) -> str:
    shown = ", ".join(f"{name} {list(shape)}" for name, shape in tensors[:limit])
    more = f" and {len(tensors) - limit} more" if len(tensors) > limit else ""
    return f"tensor{'s' if len(tensors) > 1 else ''} {shown}{more}"

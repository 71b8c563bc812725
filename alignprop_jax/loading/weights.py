"""Parameter trees from files of weights: names, layouts, and strict reading.

Torch stores a linear kernel as [out, in] and a convolution as [out, in, height, width]; the
modules here hold [in, out] and [height, width, in, out]. The name of a tensor is its path in the
tree joined by dots, the leaf renamed to `weight`. Weights of `stacked_layers` are a tensor a layer.
"""

import math
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding

from alignprop_jax.errors import UserError, note
from alignprop_jax.loading.tensor_files import read_tensors, write_safetensors
from alignprop_jax.models.stacked_layers import is_stacked, single_layers

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
_TEXT_LAYER = re.compile(r"(text_model\.encoder\.layers\.)(\d+)(\..+)")
# Which bits of a number are all set in one that is not finite. Looking at them takes a tenth of the
# time that numpy's isfinite takes of bfloat16.
_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F80_0000}


def torch_name(path: Sequence[str]) -> str:
    """The name in a state dict of the parameter at `path`."""
    return ".".join([*path[:-1], _TORCH_LEAVES.get(path[-1], path[-1])])


def to_torch_layout(path: Sequence[str], array: np.ndarray) -> np.ndarray:
    """The array of the parameter at `path` with its axes in the order of a state dict."""
    return array.transpose(_KERNEL_AXES_TO_TORCH[array.ndim]) if path[-1] == "kernel" else array


def from_torch_layout(path: Sequence[str], array: np.ndarray, out: np.ndarray) -> None:
    """Copies the inverse of `to_torch_layout` to `out`, which may be of another type."""
    if path[-1] != "kernel":
        out[...] = array
        return
    axes = _KERNEL_AXES_FROM_TORCH[array.ndim]
    # What is torch's first axis is our last one. Block by block, both stay in the cache.
    for start in range(0, len(array), _BLOCK):
        block = array[start : start + _BLOCK].astype(out.dtype, copy=False)
        out[..., start : start + _BLOCK] = block.transpose(axes)


def _empty_aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that XLA's CPU client takes as it is, so that no further copy is made."""
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
    write_safetensors(to_state_dict(tree, dtype), path, metadata)


def to_state_dict(tree: ParamTree, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The tensors of a parameter tree by their names, as in a state dict of torch."""
    tensors = {}
    for keys, leaf in flatten_dict(tree).items():
        array = np.asarray(leaf, dtype)
        arrays = array if is_stacked(keys) else array[None]
        for (path, _), single in zip(single_layers(keys, array.shape), arrays, strict=True):
            tensors[torch_name(path)] = to_torch_layout(path, single)
    return tensors


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
        UserError: as for `read_tensors`; or a tensor is missing, unexpected, there twice, of
            another shape, or holds something else than finite numbers. The message names the
            tensor. Last layers of a text tower that the model leaves out are noted instead.
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
    parameters = [_Parameter(keys, leaf, dtype) for keys, leaf in flatten_dict(abstract).items()]
    places = {
        torch_name(path): (parameter, index, _torch_shape(path, shape))
        for parameter in parameters
        for index, (path, shape) in enumerate(parameter.layers)
    }
    missing, unexpected, left_out = dict(places), [], set()
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads) as pool:
        started: deque[Future[None]] = deque()
        for name, tensor in tensors:
            known = _current_name(name, places)
            if known in missing:
                parameter, index, shape = missing.pop(known)
                _check(source, name, tensor, shape)
                started.append(pool.submit(parameter.fill, index, tensor, f"{source}: {name}"))
            elif known in places:
                raise UserError(f"{source}: tensor {name} is there twice, maybe by another name")
            elif (match := _TEXT_LAYER.fullmatch(known)) and f"{match[1]}0{match[3]}" in places:
                left_out.add(match[2])
            elif name.rsplit(".")[-1] not in _BUFFERS:
                unexpected.append((name, tensor.shape))
            # Nothing of it stays while others are read.
            del tensor
            if len(started) == num_threads:
                started.popleft().result()
        for future in started:
            future.result()
    if missing:
        listing = _listing([(name, shape) for name, (*_, shape) in missing.items()])
        raise UserError(f"{source}: the model needs {listing}, missing here")
    if unexpected:
        raise UserError(f"{source}: the model has no place for {_listing(unexpected)}, found here")
    if left_out:
        note(
            f"{source}: num_hidden_layers of config.json leaves out the last {len(left_out)} of "
            "the text encoder's layers"
        )
    return unflatten_dict({parameter.keys: parameter.placed for parameter in parameters})


class _Parameter:
    """A leaf of the tree that is being read: one tensor, or one for each layer it is stacked of."""

    def __init__(self, keys: tuple[str, ...], abstract: Any, dtype: Any):
        self.keys = keys
        self.layers = single_layers(keys, tuple(abstract.shape))
        self.placed: jax.Array | None = None
        self._abstract, self._dtype = abstract, np.dtype(dtype)
        self._array: np.ndarray | None = None
        self._to_come = len(self.layers)
        self._lock = threading.Lock()

    def fill(self, index: int, tensor: np.ndarray, origin: str) -> None:
        """Takes a layer's tensor, once; puts the array on the devices when it has all of them.

        Raises:
            UserError: a number in it is not finite; the message begins with the origin.
        """
        shape = tuple(self._abstract.shape)
        with self._lock:
            if self._array is None:
                self._array = _empty_aligned(shape, self._dtype)
        out = self._array[index] if is_stacked(self.keys) else self._array
        with np.errstate(over="ignore"):  # which is refused right after
            from_torch_layout(self.keys, tensor, out)
        if not _all_finite(out):
            raise UserError(
                f"{origin} holds numbers that are not finite in {self._dtype}, which would spoil "
                "every image; fetch or convert the file again"
            )
        with self._lock:
            self._to_come -= 1
            if self._to_come:
                return
        array, self._array = self._array, None
        sharding: Sharding | None = getattr(self._abstract, "sharding", None)
        if sharding is None:
            placed = jax.device_put(array)
        else:
            placed = jax.make_array_from_callback(shape, sharding, lambda index: array[index])
        self.placed = placed.block_until_ready()


def _all_finite(array: np.ndarray) -> bool:
    """Of a contiguous array."""
    exponent = _EXPONENT[array.dtype.name]
    bits = array.reshape(-1).view(f"uint{8 * array.itemsize}")
    # Piece by piece, which stay in the cache.
    pieces = (bits[start : start + 2**16] for start in range(0, len(bits), 2**16))
    return not any((piece & exponent == exponent).any() for piece in pieces)


def _check(source: str | Path, name: str, tensor: np.ndarray, wanted: tuple) -> None:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(
            f"{source}: tensor {name} is stored as {tensor.dtype}, where floating-point numbers "
            "belong; quantized models are not supported"
        )
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

"""Parameter trees and safetensors files: names, layouts, and strict reading and writing.

Torch stores a linear kernel as [out, in] and a convolution as [out, in, height, width]; the
modules here hold [in, out] and [height, width, in, out]. The name of a tensor is its path in the
tree joined by dots, the leaf renamed to `weight`.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from alignprop_jax.buckets import in_bucket
from alignprop_jax.errors import UserError
from alignprop_jax.loading.torch_file import read_pickle, read_pickle_shapes

ParamTree = Mapping[str, Any]

_TORCH_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_KERNEL_AXES_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_KERNEL_AXES_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}
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


def from_torch_layout(path: Sequence[str], array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    return array.transpose(_KERNEL_AXES_FROM_TORCH[array.ndim]) if path[-1] == "kernel" else array


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


def write_safetensors(
    tensors: Mapping[str, np.ndarray],
    path: epath.PathLike,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes named arrays to a disk or a bucket; UserError where the file cannot be written."""
    # safetensors writes the memory behind a view, not the view; order="C" keeps scalars scalar.
    contiguous = {name: np.array(tensor, order="C") for name, tensor in tensors.items()}
    # transformers refuses a file whose header does not name the framework.
    header = {"format": "pt", **(metadata or {})}
    if in_bucket(path):
        epath.Path(path).write_bytes(save(contiguous, header))
        return
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        usual_mode = partial.stat().st_mode
        save_file(contiguous, partial, header)
        # safetensors leaves a file that its owner alone can read.
        partial.chmod(usual_mode)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


def read_tensors(path: str | Path, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and arrays one by one, of safetensors or of a state dict by `torch.save`.

    Args:
        path: the file, or the `.json` index of one sharded over several.
        prefix: of the names; other tensors are not read.

    Raises:
        UserError: a file is absent, cut or no such file, or takes PyTorch, which is missing.
    """
    for file in _shards(Path(path)):
        read = read_safetensors if file.suffix == ".safetensors" else read_pickle
        yield from read(file, prefix)


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of one file by name; UserErrors as for `read_tensors`."""
    if Path(path).suffix != ".safetensors":
        return read_pickle_shapes(path)
    with _open(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def read_safetensors(path: str | Path, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and arrays one by one; UserError for a file that is absent, cut or another's."""
    with _open(path) as file:
        for name in file.keys():
            if name.startswith(prefix):
                yield name, _get_tensor(file, name, path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free entries of a safetensors file's header; UserErrors as for `read_safetensors`."""
    with _open(path) as file:
        return dict(file.metadata() or {})


def load_params(abstract: ParamTree, path: str | Path, dtype: Any = np.float32) -> ParamTree:
    """Fills an abstract parameter tree from a file of weights, one tensor at a time.

    Args:
        abstract: the tree a module expects: nested dicts of anything with a shape.
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
    leaves = {}
    unexpected = []
    for name, tensor in tensors:
        keys = paths.get(_current_name(name, paths))
        if keys is not None:
            _check_shape(source, name, tensor, _torch_shape(keys, expected[keys].shape))
            # Of the two types of a tensor one at a time is in memory, of its two layouts both; and
            # nothing of it while the next one is read.
            tensor = tensor.astype(dtype, copy=False)
            leaves[keys] = jax.device_put(from_torch_layout(keys, tensor)).block_until_ready()
        elif name.rsplit(".")[-1] not in _BUFFERS:
            unexpected.append((name, tensor.shape))
        del tensor
    missing = [
        (name, _torch_shape(keys, expected[keys].shape))
        for name, keys in paths.items()
        if keys not in leaves
    ]
    if missing:
        raise UserError(f"{source}: the model needs {_listing(missing)}, missing here")
    if unexpected:
        raise UserError(f"{source}: the model has no place for {_listing(unexpected)}, found here")
    return unflatten_dict(leaves)


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


def _shards(path: Path) -> list[Path]:
    if path.suffix != ".json":
        return [path]
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be read as an index of files of weights ({error})"
        ) from error
    return [path.with_name(name) for name in sorted(set(names))]


def _get_tensor(file: Any, name: str, path: str | Path) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except AttributeError as error:  # numpy has no such type
        stored = file.get_slice(name).get_dtype()
        raise UserError(
            f"{path}: tensor {name} is stored as {stored}, which cannot be read; "
            "convert the file to float16 or bfloat16"
        ) from error


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[Any]:
    try:
        # Pages of a mapped file would stay in memory beside the arrays made of them.
        with safe_open(path, framework="numpy", backend="pread") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: truncated, or not a safetensors file ({error}); fetch or convert it again"
        ) from error

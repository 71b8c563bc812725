"""Files of named tensors: safetensors, several that an index binds together, and pickles."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from alignprop_jax.errors import UserError, require_file
from alignprop_jax.inputs.foreign_json import Field, mapping_of, read_json_fields
from alignprop_jax.loading.torch_file import read_pickle, read_pickle_shapes
from alignprop_jax.loading.whole_file import whole_file

_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
}
# More than any model or LoRA has: of a file with more the header alone takes minutes to read, and
# of a tensor with more no sound file is made.
_MAX_TENSORS = 50_000
_MAX_ELEMENTS = 2**30


def _file_beside(name: Any) -> str:
    if Path(name).name != name or not name.endswith((".safetensors", ".bin")):
        raise ValueError
    return name


_INDEX = {
    "weight_map": mapping_of(
        Field(_file_beside, "the name of a .safetensors or .bin file in the same folder"),
        most=_MAX_TENSORS,
    )
}


def write_safetensors(
    tensors: Mapping[str, np.ndarray],
    path: epath.PathLike,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes named arrays to a disk or a bucket; UserError where the file cannot be written."""
    # transformers refuses a file whose header does not name the framework.
    parts = _serialize(tensors, {"format": "pt", **(metadata or {})})
    path = epath.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.writelines(parts)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


def _serialize(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """A safetensors file: the length of its header, the header as JSON, then the arrays.

    The same tensors and entries give the same bytes, in any order; the library's own writer orders
    entries anew every time.
    """
    # Wide numbers first, so that each array lies at a multiple of the size of its numbers.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        # What is written is the memory behind an array, which is not a view's order.
        yield np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data


def read_tensors(path: str | Path, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and arrays one by one, of safetensors or of a state dict by `torch.save`.

    Args:
        path: the file, or the `.json` index of one sharded over several.
        prefix: of the names; other tensors are not read.

    Raises:
        UserError: a file is absent, cut or no such file, or takes PyTorch, which is missing.
    """
    path = Path(path)
    places = {} if path.suffix != ".json" else read_json_fields(path, _INDEX)["weight_map"]
    for file in sorted(set(places.values())) or [path.name]:
        read = read_safetensors if file.endswith(".safetensors") else read_pickle
        for name, tensor in read(path.with_name(file), prefix):
            # Files may share a tensor. Then the index tells which of them counts.
            if places.get(name, file) == file:
                yield name, tensor


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


def _get_tensor(file: Any, name: str, path: str | Path) -> np.ndarray:
    shape = file.get_slice(name).get_shape()
    # Before memory is taken for it: a file of holes may well be as long as its header says.
    if math.prod(shape) > _MAX_ELEMENTS:
        raise UserError(f"{path}: tensor {name} of shape {shape} is larger than any model's")
    try:
        return file.get_tensor(name)
    except ValueError as error:  # of an array that numpy cannot make
        raise UserError(f"{path}: tensor {name} of shape {shape} cannot be read") from error
    except AttributeError as error:  # numpy has no such type
        stored = file.get_slice(name).get_dtype()
        raise UserError(
            f"{path}: tensor {name} is stored as {stored}, which cannot be read; "
            "convert the file to float16 or bfloat16"
        ) from error


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[Any]:
    require_file(path)
    try:
        # Pages of a mapped file would stay in memory beside the arrays made of them.
        with safe_open(path, framework="numpy", backend="pread") as file:
            if len(file.keys()) > _MAX_TENSORS:
                raise UserError(f"{path}: holds more than {_MAX_TENSORS} tensors")
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: truncated, or not a safetensors file ({error}); fetch or convert it again"
        ) from error

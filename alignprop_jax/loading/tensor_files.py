"""Files of named tensors: safetensors, several that an index binds together, and pickles."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from alignprop_jax.errors import UserError
from alignprop_jax.loading.buckets import in_bucket
from alignprop_jax.loading.torch_file import read_pickle, read_pickle_shapes
from alignprop_jax.records.whole_file import sync


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
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
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

"""Checkpoints that only exist as PyTorch pickles, read without running what is in them."""

import importlib.util
import mmap
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alignprop_jax.errors import UserError, require_file

EXTRA = "pip install 'alignprop_jax[pickle]'"

# A class that the trainer of the original Stable Diffusions left in their checkpoints, where it is
# the key of a dict. An empty class stands in for it.
_TRAINER_CLASS = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
# The one function that PyTorch's loader calls with whatever size a file asks for.
_BYTES = b"bytearray"


def has_pytorch() -> bool:
    """Whether pickles can be read here."""
    return importlib.util.find_spec("torch") is not None


def read_pickle(path: str | Path, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and arrays of a state dict by `torch.save`, one by one, floats as float32.

    The state dict may stand under the key "state_dict", as training scripts write it. Pickles need
    PyTorch, whose `weights_only` loader refuses everything but tensors and plain containers.

    Args:
        path: the file.
        prefix: of the names; other tensors are not read.

    Raises:
        UserError: the file is absent or damaged, holds something else, or PyTorch is missing.
    """
    tensors = _load(path)
    import torch

    for name, tensor in tensors.items():
        if name.startswith(prefix):
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            # A copy: pages of the file may be behind the tensor.
            yield name, tensor.detach().to(dtype, copy=True).numpy()


def read_pickle_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by name, raising as `read_pickle`."""
    return {name: tuple(tensor.shape) for name, tensor in _load(path).items()}


def read_pickle_step(path: str | Path) -> Any:
    """What stands as "global_step" beside or among the tensors; None where nothing does."""
    state, step = _unpickle(path), None
    while step is None and isinstance(state, dict):
        step, state = state.get("global_step"), state.get("state_dict")
    return step.tolist() if hasattr(step, "tolist") else step


def _load(path: str | Path) -> dict[str, Any]:
    state = _unpickle(path)
    import torch

    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if isinstance(state, dict) and type(state.get("global_step")) is int:
        state = {name: value for name, value in state.items() if name != "global_step"}
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(leaf, torch.Tensor) for name, leaf in state.items()
    ):
        raise UserError(f"{path}: holds no state dict, a mapping of names to tensors")
    for name, tensor in state.items():
        if not _is_plain(tensor):
            raise UserError(
                f"{path}: tensor {name} is no plain array of real numbers that the file holds whole"
            )
    return state


def _unpickle(path: str | Path) -> Any:
    require_file(path)
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: a pickle, which takes PyTorch to read: {EXTRA}, "
            "or convert the file to safetensors"
        ) from error
    stand_in = (type("TrainerClass", (), {}), _TRAINER_CLASS)
    try:
        # Before version 1.6 PyTorch wrote another format, which cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        _refuse_bombs(path, mapped)
        with torch.serialization.safe_globals([stand_in]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # The loader's own message advises to run what is in the file.
        raise UserError(
            f"{path}: cannot be read as a checkpoint of PyTorch: it is damaged, or holds more than "
            "tensors and plain containers; convert it to safetensors where you trust it"
        ) from error
    except Exception as error:  # the unpickler raises whatever a damaged file makes it
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: cannot be read as a checkpoint of PyTorch ({reason}); fetch it again"
        ) from error


def _refuse_bombs(path: str | Path, zipped: bool) -> None:
    """Raises ValueError for what takes more memory than the file is long, as no checkpoint does."""
    if not zipped:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            creates_bytes = content.find(_BYTES) >= 0
    else:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(
                entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size
                for entry in entries
            ):
                raise ValueError("it is compressed, which PyTorch's own files are not")
            pickles = (entry for entry in entries if entry.filename.endswith(".pkl"))
            creates_bytes = any(_BYTES in archive.read(entry) for entry in pickles)
    if creates_bytes:
        raise ValueError("it creates arrays of bytes, which no state dict holds")


def _is_plain(tensor: Any) -> bool:
    """Whether it is an array in memory: not sparse, not one number that stands for a million."""
    import torch

    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_complex())
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )

"""Checkpoints that only exist as PyTorch pickles, read without running what is in them."""

import importlib.util
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alignprop_jax.errors import UserError

EXTRA = "pip install 'alignprop_jax[pickle]'"

# A class that the trainer of the original Stable Diffusions left in their checkpoints, where it is
# the key of a dict. An empty class stands in for it.
_TRAINER_CLASS = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


def has_pytorch() -> bool:
    """Whether pickles can be read here."""
    return importlib.util.find_spec("torch") is not None


def read_pickle(path: str | Path, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and float32 arrays of a state dict by `torch.save`, one by one.

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
            # A copy: pages of the file may be behind the tensor.
            yield name, tensor.detach().to(torch.float32, copy=True).numpy()


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
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if isinstance(state, dict) and type(state.get("global_step")) is int:
        state = {name: value for name, value in state.items() if name != "global_step"}
    if not isinstance(state, dict) or not all(hasattr(leaf, "numpy") for leaf in state.values()):
        raise UserError(f"{path}: holds no state dict, a mapping of names to tensors")
    return state


def _unpickle(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: a pickle, which takes PyTorch to read: {EXTRA}, "
            "or convert the file to safetensors"
        ) from error
    stand_in = (type("TrainerClass", (), {}), _TRAINER_CLASS)
    try:
        with torch.serialization.safe_globals([stand_in]):
            # Before version 1.6 PyTorch wrote another format, which cannot be mapped.
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        # The loader's own message advises to run what is in the file.
        raise UserError(
            f"{path}: cannot be read as a checkpoint of PyTorch: it is damaged, or holds more than "
            "tensors and plain containers; convert it to safetensors where you trust it"
        ) from error
    except Exception as error:  # the unpickler raises whatever a damaged file makes it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as a checkpoint of PyTorch ({reason})") from error

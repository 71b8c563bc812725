"""Checkpoints that only exist as PyTorch pickles, read without running what is in them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from alignprop_jax.errors import UserError
from alignprop_jax.weights import read_safetensors


def read_tensors(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and float32 arrays of a safetensors file, or of a state dict by `torch.save`.

    A state dict may stand under the key "state_dict", as training scripts write it. Pickles need
    PyTorch, whose `weights_only` loader refuses everything but tensors and plain containers.

    Raises:
        UserError: the file is absent or damaged, holds something else, or PyTorch is missing.
    """
    if Path(path).suffix == ".safetensors":
        yield from read_safetensors(path)
        return
    state = _load_pickle(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(hasattr(leaf, "numpy") for leaf in state.values()):
        raise UserError(f"{path}: holds no state dict, a mapping of names to tensors")
    for name, tensor in state.items():
        yield name, tensor.detach().float().numpy()


def _load_pickle(path: str | Path):
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: a pickle, which takes PyTorch to read: pip install 'alignprop_jax[pickle]', "
            "or convert the file to safetensors"
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises whatever a damaged file makes it
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as a checkpoint of PyTorch ({reason})") from error

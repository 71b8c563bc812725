"""Checkpoints of what training changes: step, LoRA, optimizer, key; never the base weights."""

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from alignprop_jax.errors import UserError

State = TypeVar("State")
Fingerprint = dict[str, Any]


def make_fingerprint(model: str, dtype: str, unet_params: Any, lora: Any, alpha: float):
    """Returns what a checkpoint belongs to, as JSON: the model and the shape of its LoRA.

    The first and last convolution of the UNet stand for its weights: any training changes them.
    """
    digest = hashlib.sha256()
    for layer in ("conv_in", "conv_out"):
        digest.update(np.asarray(unet_params[layer]["kernel"], np.float32).tobytes())
    leaves = jax.tree_util.tree_leaves_with_path(lora)
    down = [(path, leaf) for path, leaf in leaves if path[-1].key == "down"]
    return {
        "model": model,
        "dtype": dtype,
        "model weights": digest.hexdigest()[:16],
        "LoRA rank": sorted({leaf.shape[1] for _, leaf in down}),
        "LoRA alpha": alpha,
        "LoRA targets": sorted({path[-2].key for path, _ in down}),
        "number of LoRA parameters": sum(leaf.size for _, leaf in leaves),
    }


class Checkpoints:
    """The checkpoints of one run, written in the background; a half-written one is never read."""

    def __init__(self, directory: Path, fingerprint: Fingerprint, keep: int):
        """Opens `directory`, made when absent; of its checkpoints the newest `keep` stay.

        Raises:
          UserError: the checkpoints there are of another model or another LoRA.
        """
        self._directory = directory.resolve()
        self._fingerprint = fingerprint
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        if self.latest_step is not None:
            self._check_fingerprint()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint; None when there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any) -> None:
        """Starts to write `state`, waiting only for a checkpoint that is still being written."""
        if step == self.latest_step:
            return
        # A copy, because the next train step is free to overwrite the donated state in place.
        copy = jax.tree.map(jnp.copy, _without_typed_keys(state))
        self._checkpointer.save_async(
            step, copy, force=True, custom_metadata={"fingerprint": self._fingerprint}
        )

    def restore(self, state: State) -> State:
        """Returns the newest checkpoint, with the structure and shardings of `state`.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            _without_typed_keys(state),
        )
        try:
            restored = self._checkpointer.load(self.latest_step, abstract)
        except Exception as error:
            raise UserError(
                f"checkpoint {self._directory / str(self.latest_step)} cannot be read "
                f"({type(error).__name__}); remove that folder to resume from the one before it"
            ) from error
        return jax.tree.map(_with_key_type_of, state, restored)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._checkpointer.close()

    def _check_fingerprint(self) -> None:
        metadata = self._checkpointer.metadata(self.latest_step).custom_metadata or {}
        saved = metadata.get("fingerprint", {})
        for name, value in self._fingerprint.items():
            if saved.get(name) != value:
                raise UserError(
                    f"checkpoint {self._directory / str(self.latest_step)} has {name} "
                    f"{saved.get(name)}, this run {value}; give this run another --workdir"
                )


def _is_typed_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_typed_keys(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_typed_key(x) else x, state)


def _with_key_type_of(like: jax.Array, leaf: jax.Array) -> jax.Array:
    if not _is_typed_key(like):
        return leaf
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))

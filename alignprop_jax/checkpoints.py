"""Checkpoints of what training changes: step, LoRA, optimizer, key; never the base weights."""

import hashlib
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from alignprop_jax.devices import sharding
from alignprop_jax.errors import UserError

State = TypeVar("State")
Fingerprint = dict[str, Any]


def make_fingerprint(model: str, dtype: str, unet_params: Any, lora: Any, alpha: float):
    """Returns what a checkpoint belongs to, as JSON: the model and the shape of its LoRA.

    The first and last convolution of the UNet stand for its weights: any training changes them.
    """
    digest = hashlib.sha256()
    for layer in ("conv_in", "conv_out"):
        kernel = sharding.gather(unet_params[layer]["kernel"])
        digest.update(np.asarray(kernel, np.float32).tobytes())
    leaves = jax.tree_util.tree_leaves_with_path(lora)
    down = [(path, leaf) for path, leaf in leaves if path[-1].key == "down"]
    return {
        "model": model,
        "dtype": dtype,
        "model weights": digest.hexdigest()[:16],
        "LoRA rank": sorted({leaf.shape[-1] for _, leaf in down}),
        "LoRA alpha": alpha,
        "LoRA targets": sorted({path[-2].key for path, _ in down}),
        "number of LoRA parameters": sum(leaf.size for _, leaf in leaves),
    }


def restore(directory: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """Reads a checkpoint of a run, on any machine, without its model.

    Args:
      directory: the folder "checkpoints" of a run.
      step: which one; None for the newest.

    Returns:
      What training changes, as numpy arrays: "step", "lora", "opt_state", "key" and the counts of
      steps that were skipped.

    Raises:
      UserError: there is no such checkpoint, or it cannot be read.
    """
    directory = epath.Path(directory)
    names = directory.iterdir() if directory.is_dir() else ()
    steps = sorted(int(path.name) for path in names if path.name.isdigit())
    if not steps or (step is not None and step not in steps):
        found = f"; there are {', '.join(map(str, steps))}" if steps else ""
        raise UserError(f"no checkpoint {'' if step is None else step} in {directory}{found}")
    path = directory.resolve() / str(steps[-1] if step is None else step)
    from orbax.checkpoint import v1 as ocp

    try:
        arrays = jax.tree.map(lambda saved: np.empty(0, saved.dtype), ocp.metadata(path).metadata)
        return ocp.load(path, arrays)
    except Exception as error:
        raise _cannot_be_read(path, error) from error


class Checkpoints:
    """The checkpoints of one run, written in the background; a half-written one is never read.

    All processes have to call every method.
    """

    def __init__(
        self, directory: epath.PathLike, fingerprint: Fingerprint, keep: int, keep_best: int = 0
    ):
        """Opens `directory`, made when absent.

        Args:
          fingerprint: what the checkpoints have to be of.
          keep: how many of the newest stay.
          keep_best: how many stay besides, of those that were saved with a reward.

        Raises:
          UserError: the checkpoints there are of another model or another LoRA.
        """
        # Importing it takes half a second that a mistyped flag should not cost.
        from orbax.checkpoint import v1 as ocp

        self._directory = epath.Path(directory).resolve()
        self._fingerprint = fingerprint
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            n=keep_best,
            get_metric_fn=lambda metrics: metrics["reward"],
            keep_checkpoints_without_metrics=False,
        )
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )
        if self.latest_step is not None:
            self._check_fingerprint()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint; None when there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, reward: float | None = None) -> None:
        """Starts to write `state`, waiting only for a checkpoint that is still being written.

        Args:
          reward: how good it is, where that is known.
        """
        if step == self.latest_step:
            return
        # A copy, because the next train step is free to overwrite the donated state in place; on
        # the host, as all of it is on every device.
        copy = jax.tree.map(np.array, _without_typed_keys(state))
        known = reward is not None and math.isfinite(reward)
        self._checkpointer.save_async(
            step,
            copy,
            force=True,
            metrics={"reward": reward} if known else None,
            custom_metadata={"fingerprint": self._fingerprint},
        )

    def restore(self, state: State) -> State:
        """Returns the newest checkpoint, with the structure and shardings of `state`.

        It may have been written on another number of devices or hosts.

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
            path = self._directory / str(self.latest_step)
            raise _cannot_be_read(path, error) from error
        return jax.tree.map(_with_key_type_of, state, restored)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._checkpointer.close()

    def _check_fingerprint(self) -> None:
        metadata = self._checkpointer.metadata(self.latest_step).custom_metadata or {}
        saved = metadata.get("fingerprint", {})
        for name, value in self._fingerprint.items():
            if saved.get(name) != value:
                self.close()
                raise UserError(
                    f"checkpoint {self._directory / str(self.latest_step)} has {name} "
                    f"{saved.get(name)}, this run {value}; give this run another --workdir"
                )


def _cannot_be_read(path: epath.Path, error: Exception) -> UserError:
    return UserError(
        f"checkpoint {path} cannot be read ({type(error).__name__}); "
        "remove that folder to resume from the one before it"
    )


def _is_typed_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_typed_keys(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_typed_key(x) else x, state)


def _with_key_type_of(like: jax.Array, leaf: jax.Array) -> jax.Array:
    if not _is_typed_key(like):
        return leaf
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))

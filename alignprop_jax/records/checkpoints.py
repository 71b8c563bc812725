"""Checkpoints of what training changes: step, LoRA, optimizer, key; never the base weights."""

import hashlib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from alignprop_jax.devices import sharding
from alignprop_jax.devices.distributed import is_main
from alignprop_jax.errors import UserError
from alignprop_jax.loading.buckets import in_bucket
from alignprop_jax.loading.whole_file import sync

State = TypeVar("State")
Fingerprint = dict[str, Any]


def make_fingerprint(
    model: str, dtype: str, weights: Sequence[jax.Array], lora: Any, alpha: float
) -> Fingerprint:
    """Returns what a checkpoint belongs to, as JSON: the model and the shape of its LoRA.

    Args:
        weights: a few that stand for all of the model, see `Generator.weights_that_tell`.
    """
    digest = hashlib.sha256()
    for array in weights:
        digest.update(np.asarray(sharding.gather(array), np.float32).tobytes())
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
    steps = sorted(_steps_in(directory))
    if not steps or (step is not None and step not in steps):
        found = f"; there are {', '.join(map(str, steps))}" if steps else ""
        raise UserError(f"no checkpoint {'' if step is None else step} in {directory}{found}")
    path = directory.resolve() / str(steps[-1] if step is None else step)
    from orbax.checkpoint import v1 as ocp

    _quieten_orbax()
    try:
        arrays = jax.tree.map(lambda saved: np.empty(0, saved.dtype), ocp.metadata(path).metadata)
        return ocp.load(path, arrays)
    except Exception as error:
        raise _cannot_be_read(path, error, min(steps) < int(path.name)) from error


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
          UserError: the checkpoints there are of another model or another LoRA, or the newest is
            damaged.
        """
        # Importing it takes half a second that a mistyped flag should not cost.
        from orbax.checkpoint import v1 as ocp

        _quieten_orbax()
        # On a disk, paths are absolute for Orbax.
        self._directory = epath.Path(directory).resolve()
        self._fingerprint = fingerprint
        self._step_being_written: int | None = None
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            n=keep_best,
            get_metric_fn=lambda metrics: metrics["reward"],
            keep_checkpoints_without_metrics=False,
        )
        self._policy = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(
                f"{directory} is no folder; remove it, or give another --workdir"
            ) from error
        # Orbax copies what it is given, and of a method the object, too.
        asynchronous = ocp.options.AsyncOptions(post_finalization_callback=lambda: self._sync())
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self._directory,
                context=ocp.Context(async_options=asynchronous),
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
            )
        except ValueError as error:
            # Orbax has read what the folder of every checkpoint says of itself.
            newest = max(_steps_in(self._directory), default="")
            raise _cannot_be_read(self._directory / str(newest), error) from error
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
        self._checkpointer.wait()
        self._step_being_written = step
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
            raise self._newest_cannot_be_read(error) from error
        return jax.tree.map(_with_key_type_of, state, restored)

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._checkpointer.wait()

    def remove_old(self) -> None:
        """Removes what a run that was killed while it did so had no longer kept."""
        from orbax.checkpoint import v1 as ocp

        context = ocp.training.preservation_policies.PreservationContext()
        known = list(self._checkpointer.checkpoints)
        kept = self._policy.should_preserve(known, context=context)
        for checkpoint in (old for old, keep in zip(known, kept, strict=True) if not keep):
            self._checkpointer.delete(checkpoint)

    def close(self) -> None:
        """Waits until everything is on disk, and lets it go."""
        self._checkpointer.close()

    def _sync(self) -> None:
        """Has the disk hold a checkpoint before it gets its name, and before others are removed."""
        if in_bucket(self._directory) or not is_main():
            return
        for folder in Path(self._directory).glob(f"{self._step_being_written}.*"):
            for path in (*folder.rglob("*"), folder):
                sync(path)

    def _check_fingerprint(self) -> None:
        try:
            metadata = self._checkpointer.metadata(self.latest_step).custom_metadata or {}
            saved = dict(metadata.get("fingerprint", "nothing says what it is of"))
        except Exception as error:
            problem = self._newest_cannot_be_read(error)
            self.close()
            raise problem from error
        for name, value in self._fingerprint.items():
            if saved.get(name) != value:
                self.close()
                raise UserError(
                    f"checkpoint {self._directory / str(self.latest_step)} has {name} "
                    f"{saved.get(name)}, this run {value}; give this run another --workdir"
                )

    def _newest_cannot_be_read(self, error: Exception) -> UserError:
        others = len(self._checkpointer.checkpoints) > 1
        return _cannot_be_read(self._directory / str(self.latest_step), error, others)


def _steps_in(directory: epath.Path) -> Iterator[int]:
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name.isdecimal() and path.is_dir():
            yield int(path.name)


def _cannot_be_read(path: epath.Path, error: Exception, earlier: bool = True) -> UserError:
    then = "resume from the one before it" if earlier else "begin anew"
    return UserError(
        f"checkpoint {path} cannot be read ({type(error).__name__}); remove that folder to {then}"
    )


def _quieten_orbax() -> None:
    """Leaves out the traces of threads that cannot go on: the next call raises the error itself."""
    absl = logging.getLogger("absl")
    if _is_not_of_orbax in absl.filters:
        return
    for logger in (absl, logging.getLogger("asyncio")):
        logger.addFilter(_is_not_of_orbax)
    show = sys.unraisablehook

    def show_all_but_closed_loops(ignored) -> None:
        # TensorStore tells asyncio, or uvloop, of what nobody waits for any more.
        trace = ignored.exc_traceback
        if trace is None or "call_soon_threadsafe" not in trace.tb_frame.f_code.co_name:
            show(ignored)

    sys.unraisablehook = show_all_but_closed_loops


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    text = f"{record.pathname} {record.getMessage()} {record.exc_info and record.exc_info[1]}"
    return "/orbax/" not in text and "tensorstore" not in text


def _is_typed_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_typed_keys(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_typed_key(x) else x, state)


def _with_key_type_of(like: jax.Array, leaf: jax.Array) -> jax.Array:
    if not _is_typed_key(like):
        return leaf
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))

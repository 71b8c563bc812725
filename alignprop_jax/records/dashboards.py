"""Scalars and pictures for TensorBoard and Weights & Biases."""

import re
import time
import uuid
from typing import Any, Protocol

import numpy as np
from etils import epath
from PIL import Image

from alignprop_jax.devices.distributed import is_main
from alignprop_jax.errors import UserError
from alignprop_jax.loading.buckets import in_bucket
from alignprop_jax.process import signals
from alignprop_jax.records.metrics import write_atomically

# An event file in a bucket is written as a whole at each.
_SECONDS_BETWEEN_FLUSHES = 60


class Dashboard(Protocol):
    """Where a run shows its progress."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds a point to the curve of every name."""

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Adds a picture."""

    def close(self) -> None:
        """Writes what is still in memory."""


def open_dashboards(
    workdir: epath.Path, config: dict[str, Any], first_step: int, *, tensorboard: bool, wandb: bool
) -> list[Dashboard]:
    """Opens the dashboards that are switched on; `first_step` is the first they will be given.

    There are none but in the main process.

    Raises:
      UserError: Weights & Biases is wanted and not installed.
    """
    dashboards: list[Dashboard] = []
    if not is_main():
        return dashboards
    if wandb:
        dashboards.append(WeightsAndBiases(workdir, config))
    if tensorboard:
        dashboards.append(TensorBoard(workdir / "tensorboard", first_step))
    return dashboards


class TensorBoard:
    """Event files for `tensorboard --logdir`."""

    def __init__(self, folder: epath.Path, first_step: int):
        # It takes seconds to import, which a mistyped flag should not cost.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event, self._summary = Event, summary
        folder.mkdir(parents=True, exist_ok=True)
        # tensorboardX's usual writer is a thread, after whose end on a full disk the run waits for
        # it for ever.
        self._writer = event_file_writer.EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        # What a killed run wrote past its last checkpoint is about to be written again.
        self._write(first_step, session_log=SessionLog(status=SessionLog.START))
        signals.at_end(self.close)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(step, summary=self._summary.scalar(name, value))

    def image(self, step: int, name: str, image: Image.Image) -> None:
        picture = self._summary.image(name, np.asarray(image), dataformats="HWC")
        self._write(step, summary=picture)

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._writer.flush()
            self._flushed = time.monotonic()


class WeightsAndBiases:
    """A run on Weights & Biases, continued when the workdir already has one."""

    def __init__(self, workdir: epath.Path, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "config.logging.wandb=True needs wandb: pip install wandb, or leave it off"
            ) from error
        self._image = wandb.Image
        id_file = workdir / "wandb_run_id.txt"
        known = id_file.read_bytes() if id_file.exists() else b""
        if not re.fullmatch(rb"[\w-]+", known):
            write_atomically(id_file, uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project="alignprop_jax",
            name=workdir.name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            # Its own files are local ones.
            dir=None if in_bucket(workdir) else str(workdir),
            config=config,
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()

"""Scalars and pictures for TensorBoard and Weights & Biases."""

import uuid
from typing import Any, Protocol

import numpy as np
from etils import epath
from PIL import Image

from alignprop_jax import signals
from alignprop_jax.devices.distributed import is_main
from alignprop_jax.errors import UserError
from alignprop_jax.loading.buckets import in_bucket


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
        from tensorboardX import SummaryWriter

        # What a killed run wrote past its last checkpoint is about to be written again.
        self._writer = SummaryWriter(str(folder), purge_step=first_step)
        signals.at_end(self.close)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


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
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
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

"""The folder of a run and the names of what lies in it."""

import json
import uuid
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from alignprop_jax.config import describe_changes, to_json
from alignprop_jax.devices.distributed import all_agree, from_main, is_main, on_main
from alignprop_jax.errors import UserError
from alignprop_jax.evaluation.evaluator import Evaluation
from alignprop_jax.lora.files import LORA_FILE
from alignprop_jax.lora.kohya import KOHYA_FILE
from alignprop_jax.records.metrics import JsonLines, Record, write_atomically, write_json
from alignprop_jax.records.whole_file import whole_file


class Workdir:
    """config.json, metrics.jsonl, eval.jsonl, images/, checkpoints/, lora/, summary.json, ...

    On a local disk, on one that hosts share, or in a bucket, gs://BUCKET/FOLDER. Every process has
    the object; what writes does so in the main one.
    """

    def __init__(self, path: epath.PathLike):
        """Makes the folder when it is absent.

        Raises:
          UserError: it cannot be written, or the hosts do not share it.
        """
        path = epath.Path(path)
        self.path = path
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.evaluations = JsonLines(path / "eval.jsonl")
        self.images = path / "images"
        self.checkpoints = path / "checkpoints"
        self.lora = path / "lora" / LORA_FILE
        self.kohya_lora = path / "lora" / KOHYA_FILE
        self.text_lora = path / "lora" / "text_encoder_of_init.safetensors"
        self.unet = path / "unet" / "diffusion_pytorch_model.safetensors"
        self.reward_parts = path / "reward_parts.json"
        self._summary = path / "summary.json"
        self._config = path / "config.json"
        self._make()

    def _make(self) -> None:
        # Of its own name, as two runs may start at once.
        probe = self.path / from_main(f".writable.{uuid.uuid4().hex}")
        problem = None
        if is_main():
            try:
                self.images.mkdir(parents=True, exist_ok=True)
                probe.touch()
            except ImportError:
                problem = "needs gcsfs: pip install 'alignprop_jax[gcs]'"
            except Exception as error:  # A bucket's errors are those of its library.
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                problem = f"cannot be written ({reason}); give --workdir a folder that can"
        problem = from_main(problem)
        if not problem and not all_agree(probe.exists()):
            problem = "is not the same on all hosts; give --workdir a bucket, gs://BUCKET/FOLDER"
        if problem:
            raise UserError(f"workdir {str(self.path)!r} {problem}")
        if is_main():
            probe.unlink()

    def save_config(self, config: ConfigDict) -> list[str]:
        """Writes the resolved config; returns what differs from the one that was there."""
        changes = []
        if self._config.exists():
            changes = describe_changes(json.loads(self._config.read_text("utf-8")), config)
        write_atomically(self._config, to_json(config))
        return changes

    @on_main
    def rewind(self, step: int) -> None:
        """Forgets every record after `step`, and so what a killed run wrote past its checkpoint.

        Before the first, step -1, the scale of the reward is forgotten, too.
        """
        if step < 0:
            self.reward_parts.unlink(missing_ok=True)
        for records in (self.metrics, self.evaluations):
            records.keep(lambda record: record["step"] <= step)
        self._summary.unlink(missing_ok=True)

    @on_main
    def save_image(self, name: str, image: Image.Image) -> None:
        """Writes images/NAME.png."""
        with whole_file(self.images / f"{name}.png") as file:
            image.save(file, "PNG")

    @on_main
    def save_before(self, evaluations: dict[str, Evaluation]) -> None:
        """Keeps the untrained model's images by split, for a comparison after a resume."""
        temporary = self.images / "before.tmp.npz"
        with temporary.open("wb") as file:
            np.savez_compressed(file, **{name: e.images for name, e in evaluations.items()})
        temporary.replace(self.images / "before.npz")

    def load_before(self) -> dict[str, np.ndarray]:
        """Returns the images that `save_before` kept, [P, H, W, 3] by split."""
        with (self.images / "before.npz").open("rb") as file, np.load(file) as images:
            return dict(images)

    def save_summary(self, summary: Record) -> None:
        """Writes summary.json, the mark of a finished run."""
        write_json(self._summary, summary)

    def load_summary(self) -> dict[str, Any] | None:
        """Returns summary.json; None before the run has finished."""
        if not self._summary.exists():
            return None
        return json.loads(self._summary.read_text("utf-8"))

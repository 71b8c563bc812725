"""The folder of a run and the names of what lies in it."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from alignprop_jax.config import to_json
from alignprop_jax.devices.distributed import all_agree, from_main, is_main, on_main
from alignprop_jax.errors import UserError, note
from alignprop_jax.inputs.foreign_json import integer, number, optional, text
from alignprop_jax.loading.whole_file import whole_file
from alignprop_jax.lora.files import LORA_FILE
from alignprop_jax.lora.kohya import KOHYA_FILE
from alignprop_jax.records.metrics import (
    JsonLines,
    Record,
    read_json,
    write_atomically,
    write_json,
)

_STEP = {"step": integer(0, 2**53)}
_SCORE = optional(number(-1e300, 1e300))
_METRICS = {**_STEP, "step_seconds": optional(number(0, 1e12))}
_EVALUATION = {**_STEP, "split": text(), "n": integer(1, 2**53), "reward_mean": _SCORE}
_SUMMARY = {
    "steps": integer(1, 2**53),
    "seconds_per_step": _SCORE,
    "peak_rss_gb": _SCORE,
    **dict.fromkeys(("reward_before", "reward_after", "unseen_before", "unseen_after"), _SCORE),
}


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
        self.metrics = JsonLines(path / "metrics.jsonl", _METRICS)
        self.evaluations = JsonLines(path / "eval.jsonl", _EVALUATION)
        self.images = path / "images"
        self.checkpoints = path / "checkpoints"
        self.lora = path / "lora" / LORA_FILE
        self.kohya_lora = path / "lora" / KOHYA_FILE
        self.text_lora = path / "lora" / "text_encoder_of_init.safetensors"
        self.unet = path / "unet" / "diffusion_pytorch_model.safetensors"
        self.reward_parts = path / "reward_parts.json"
        self._summary = path / "summary.json"
        self._before = self.images / "before.npz"
        self._config = path / "config.json"
        self._contents = path / "contents.json"
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

    def has_run(self) -> bool:
        """Whether there is a run that has come to a checkpoint or to its end."""
        if self._summary.exists():
            return True
        steps = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return any(step.name.isdecimal() for step in steps)

    def save_config(self, config: ConfigDict, contents: Mapping[str, str]) -> None:
        """Writes the resolved config, and the digests of what it names."""
        write_atomically(self._config, to_json(config))
        write_json(self._contents, dict(contents))

    def load_config(self) -> dict[str, Any] | None:
        """Returns config.json; None where there is none that can be read."""
        return read_json(self._config)

    def load_contents(self) -> dict[str, str]:
        """Returns the digests; none in a run of an earlier release."""
        return read_json(self._contents) or {}

    @on_main
    def rewind(self, step: int) -> None:
        """Forgets every record after `step`, and so what a killed run wrote past its checkpoint.

        Before the first, step -1, the scale of the reward is forgotten, too. Says which steps have
        lost their record.
        """
        if step < 0:
            self.reward_parts.unlink(missing_ok=True)
        for records in (self.metrics, self.evaluations):
            records.keep(lambda record: record["step"] <= step)
        self._summary.unlink(missing_ok=True)
        missing = sorted(set(range(1, step + 1)) - {r["step"] for r in self.metrics.read()})
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            note(f"{self.path / 'metrics.jsonl'} has no record of step {missing[0]}{more}")

    @on_main
    def order_evaluations(self) -> None:
        """Sorts eval.jsonl by step, where one was evaluated again."""
        self.evaluations.replace(sorted(self.evaluations.read(), key=lambda r: r["step"]))

    def lacks_evaluation(self, step: int, splits: Sequence[str]) -> bool:
        """Whether eval.jsonl has not all splits at a step."""
        known = {r["split"] for r in self.evaluations.read() if r["step"] == step}
        return not known.issuperset(splits)

    @on_main
    def save_image(self, name: str, image: Image.Image) -> None:
        """Writes images/NAME.png."""
        with whole_file(self.images / f"{name}.png") as file:
            image.save(file, "PNG")

    @on_main
    def save_before(self, images: Mapping[str, np.ndarray]) -> None:
        """Keeps the untrained model's images by split, for a comparison after a resume."""
        with whole_file(self._before) as file:
            np.savez_compressed(file, **images)

    def load_before(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray] | None:
        """Returns the images that `save_before` kept, of these shapes, [P, H, W, 3] by split.

        None where there are no such images, and a note says why.
        """
        try:
            with self._before.open("rb") as file, np.load(file) as images:
                before = dict(images)
            found = {name: (image.shape, image.dtype) for name, image in before.items()}
            if found == {name: (shape, np.uint8) for name, shape in shapes.items()}:
                return before
            reason = "it is of other images"
        except Exception as error:  # A damaged archive makes numpy and zipfile raise what not.
            reason = getattr(error, "strerror", None) or type(error).__name__
        note(f"{self._before} cannot be used ({reason})")
        return None

    def save_summary(self, summary: Record) -> None:
        """Writes summary.json, the mark of a finished run."""
        write_json(self._summary, summary)

    def load_summary(self) -> dict[str, Any] | None:
        """Returns summary.json; None before the run has finished, or where it cannot be read."""
        return read_json(self._summary, _SUMMARY)

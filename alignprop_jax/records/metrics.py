"""Records of a run as JSON: a line each in metrics.jsonl and eval.jsonl, and its summary."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from alignprop_jax.devices.distributed import on_main
from alignprop_jax.loading.buckets import in_bucket

Record = dict[str, Any]


class JsonLines:
    """A file of one JSON object a line that survives a kill at any moment.

    The main process writes it.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)

    @on_main
    def append(self, record: Record) -> None:
        """Adds a line; it has reached the operating system, or the bucket, when this returns."""
        line = json.dumps(_finite(record)) + "\n"
        if in_bucket(self._path):
            # An object cannot grow. It is replaced, which is quick beside a step on a pod.
            before = self._path.read_text("utf-8") if self._path.exists() else ""
            write_atomically(self._path, before + line)
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)

    def read(self) -> list[Record]:
        """Returns the whole lines; the last one does not count if a kill cut it short."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @on_main
    def keep(self, condition: Callable[[Record], bool]) -> None:
        """Drops every line whose record does not meet the condition, and a line cut short."""
        kept = [json.dumps(record) + "\n" for record in self.read() if condition(record)]
        write_atomically(self._path, "".join(kept))


def write_json(path: Path | epath.Path, record: Record) -> None:
    """Writes one indented JSON object, in the main process."""
    write_atomically(path, json.dumps(_finite(record), indent=2) + "\n")


@on_main
def write_atomically(path: Path | epath.Path, text: str) -> None:
    """Replaces a file so that a reader, or a kill, finds the old text or the new one.

    The main process does so.
    """
    if in_bucket(path):
        # An object appears when all of it is there.
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _finite(record: Record) -> Record:
    """JSON has no NaN and no infinity: they become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }

"""Records of a run as JSON: a line each in metrics.jsonl and eval.jsonl, and its summary."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class JsonLines:
    """A file of one JSON object a line that survives a kill at any moment."""

    def __init__(self, path: Path):
        self._path = path

    def append(self, record: Record) -> None:
        """Adds a line; it has reached the operating system when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record)) + "\n")

    def read(self) -> list[Record]:
        """Returns the whole lines; the last one does not count if a kill cut it short."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def keep(self, condition: Callable[[Record], bool]) -> None:
        """Drops every line whose record does not meet the condition, and a line cut short."""
        kept = [json.dumps(record) + "\n" for record in self.read() if condition(record)]
        write_atomically(self._path, "".join(kept))


def write_json(path: Path, record: Record) -> None:
    """Writes one indented JSON object."""
    write_atomically(path, json.dumps(_finite(record), indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file so that a reader, or a kill, finds the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _finite(record: Record) -> Record:
    """JSON has no NaN and no infinity: they become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }

"""Records of a run as JSON: a line each in metrics.jsonl and eval.jsonl, and its summary.

Writing is on the disk, or in the bucket, when it returns. Reading leaves out what is damaged, and
says of which file.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from alignprop_jax.devices.distributed import on_main
from alignprop_jax.errors import UserError, note
from alignprop_jax.inputs.foreign_json import Schema, number, optional, read_fields
from alignprop_jax.loading.buckets import in_bucket
from alignprop_jax.loading.whole_file import sync, whole_file

Record = dict[str, Any]

_SCORE = optional(number(-1e300, 1e300))


class JsonLines:
    """A file of one JSON object a line that survives a kill, or a power cut, at any moment.

    The main process writes it.
    """

    def __init__(self, path: epath.PathLike, schema: Schema | None = None):
        """Opens the file, which may be absent.

        Args:
            path: where it is.
            schema: keys that every record has; a line without them is a damaged one. So is one
                with a key NAME_mean, of a score, that is neither a number nor null.
        """
        self._path = epath.Path(path)
        self._schema = schema or {}

    @on_main
    def append(self, record: Record) -> None:
        """Adds a line."""
        line = _to_json(record) + "\n"
        if in_bucket(self._path):
            # An object cannot grow. It is replaced, which is quick beside a step on a pod.
            before = self._path.read_bytes() if self._path.exists() else b""
            with whole_file(self._path) as file:
                file.write(before + line.encode())
            return
        is_new = not self._path.exists()
        with self._path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync(self._path.parent)

    def read(self) -> list[Record]:
        """Returns the records of all lines but those that are damaged.

        A note says which these are. Of a last line that a kill cut short it says nothing.
        """
        if not self._path.exists():
            return []
        records, damaged = [], []
        *lines, last = self._path.read_bytes().split(b"\n")
        for index, line in enumerate(lines, start=1):
            record = self._parse(line)
            if record is None:
                damaged.append(index)
            else:
                records.append(record)
        record = self._parse(last)
        records += [] if record is None else [record]
        if damaged:
            first, more = damaged[0], len(damaged) - 1
            note(
                f"{self._path}: line {first}{f' and {more} more' if more else ''} cannot be read "
                "as a record and is left out"
            )
        return records

    @on_main
    def keep(self, condition: Callable[[Record], bool]) -> None:
        """Drops every line whose record does not meet the condition, and every damaged one."""
        self.replace(record for record in self.read() if condition(record))

    @on_main
    def replace(self, records: Iterable[Record]) -> None:
        """Writes the whole file anew."""
        write_atomically(self._path, "".join(_to_json(record) + "\n" for record in records))

    def _parse(self, line: bytes) -> Record | None:
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                return None
            means = {key: _SCORE for key in record if key.endswith("_mean")}
            read_fields(record, {**means, **self._schema})
        except (ValueError, RecursionError, UserError):
            return None
        return record


def read_json(path: epath.Path, schema: Schema | None = None) -> Record | None:
    """Returns the object that a file of this project holds.

    None where there is no file, or where it is damaged, which a note says: it holds no JSON object,
    or not the keys of the schema.
    """
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        read_fields(value, schema or {})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, UserError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        note(f"{path} cannot be read and counts for nothing ({reason})")
        return None
    return value


def write_json(path: Path | epath.Path, record: Record) -> None:
    """Writes one indented JSON object, in the main process."""
    write_atomically(path, _to_json(record, indent=2) + "\n")


@on_main
def write_atomically(path: Path | epath.Path, text: str) -> None:
    """Replaces a file so that a reader, or a kill, finds the old text or the new one.

    The main process does so.
    """
    with whole_file(path) as file:
        file.write(text.encode())


def _to_json(record: Record, indent: int | None = None) -> str:
    return json.dumps(_finite(record), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, however deep they lie."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value

"""Paths that are in a bucket, such as gs://BUCKET/FOLDER, and not on this machine."""

import tempfile
from pathlib import Path

from etils import epath


def in_bucket(path: str | Path | epath.Path) -> bool:
    """Whether a path is not of this machine's file system but, such as gs://, of a bucket."""
    return "://" in str(path)


def local_copy(path: epath.Path) -> Path:
    """The file itself, or a copy of one in a bucket."""
    if not in_bucket(path):
        return Path(path)
    local = Path(tempfile.mkdtemp()) / path.name
    local.write_bytes(path.read_bytes())
    return local

"""Paths that are in a bucket, such as gs://BUCKET/FOLDER, and not on this machine."""

from pathlib import Path

from etils import epath


def in_bucket(path: str | Path | epath.Path) -> bool:
    """Whether a path is not of this machine's file system but, such as gs://, of a bucket."""
    return "://" in str(path)

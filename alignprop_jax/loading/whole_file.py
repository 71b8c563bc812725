"""Files that are there whole or not at all, also after a kill or when the power goes."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from etils import epath

from alignprop_jax.loading.buckets import in_bucket


@contextlib.contextmanager
def whole_file(path: epath.PathLike) -> Iterator[BinaryIO]:
    """Opens a file to write bytes to, which takes the place of `path` when the block is done.

    It is on the disk then, or in the bucket. Where the block fails, what was at `path` stays.
    """
    path = epath.Path(path)
    if in_bucket(path):
        # An object appears when it is closed, also after an exception.
        content = io.BytesIO()
        yield content
        path.write_bytes(content.getvalue())
        return
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        # The disk may be full of it.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: epath.PathLike) -> None:
    """Has the disk hold what was written to a file, or the names that lie in a folder."""
    descriptor = os.open(Path(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

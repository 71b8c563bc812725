"""Files that are there whole or not at all, also when the process is killed."""

import contextlib
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from alignprop_jax.loading.buckets import in_bucket


@contextlib.contextmanager
def whole_file(path: epath.PathLike) -> Iterator[BinaryIO]:
    """Opens a file to write bytes to, which takes the place of `path` when the block is done."""
    path = epath.Path(path)
    # An object in a bucket appears when all of it is there.
    written = path if in_bucket(path) else path.with_name(f"{path.name}.tmp")
    with written.open("wb") as file:
        yield file
    if written != path:
        written.replace(path)

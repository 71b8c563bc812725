"""Files that are there whole or not at all, also when the process is killed."""

import contextlib
import io
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from alignprop_jax.loading.buckets import in_bucket


@contextlib.contextmanager
def whole_file(path: epath.PathLike) -> Iterator[BinaryIO]:
    """Opens a file to write bytes to, which takes the place of `path` when the block is done."""
    path = epath.Path(path)
    if in_bucket(path):
        # An object appears when it is closed, also after an exception.
        content = io.BytesIO()
        yield content
        path.write_bytes(content.getvalue())
        return
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise

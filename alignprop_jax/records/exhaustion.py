"""A full disk and a lack of memory, said in one line whichever library found them."""

import contextlib
import errno
import os
from collections.abc import Iterator

from etils import epath
from ml_collections import ConfigDict

from alignprop_jax.errors import UserError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_MEMORY = ("RESOURCE_EXHAUSTED", "bad_alloc", "Out of memory", "out of memory")


def images_of(config: ConfigDict) -> str:
    """The setting that says how many images a run has in memory at a time."""
    key = "microbatch_size" if config.train.microbatch_size else "batch_size"
    return f"config.train.{key}={config.train[key]}"


@contextlib.contextmanager
def named(folder: epath.PathLike, images: str, remat: str | None = None) -> Iterator[None]:
    """Makes one line of the error that ends a program when the disk or the memory is full.

    Args:
        folder: what the program writes to.
        images: the config's or the program's setting of how many are in memory, "KEY=VALUE".
        remat: the config's, for a program that trains.

    Raises:
        UserError: it names the folder, or the setting.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        problem = _describe(error, folder, images, remat)
        if problem is None:
            raise
        raise UserError(problem) from error


def _describe(
    error: Exception, folder: epath.PathLike, images: str, remat: str | None
) -> str | None:
    text = str(error)
    for number in _DISK:
        reason = os.strerror(number)
        # Libraries of C++ keep the words alone.
        if getattr(error, "errno", None) == number or reason in text:
            return (
                f"{folder} cannot be written to ({reason}); nothing that it holds is lost: make "
                "room on that disk, and the same command goes on"
            )
    if isinstance(error, MemoryError) or any(words in text for words in _MEMORY):
        fewer = "config.train.microbatch_size to fewer" if "config" in images else "fewer"
        cure = "" if remat is None else f", or config.remat, now {remat}, to step or block"
        return f"out of memory with {images} images at a time; set {fewer}{cure}"
    return None

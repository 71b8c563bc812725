"""A full disk and a lack of memory, however a library says it."""

import errno
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from alignprop_jax.config import default_config
from alignprop_jax.errors import UserError
from alignprop_jax.records import exhaustion

NO_SPACE = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, NO_SPACE),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        OSError(errno.EROFS, os.strerror(errno.EROFS), "file"),
        ValueError(f"RESOURCE_EXHAUSTED: Error writing 'a' [OS error 28: ENOSPC {NO_SPACE}]"),
    ],
)
def test_a_full_disk_names_the_folder(error):
    with pytest.raises(UserError, match="runs/a cannot be written to .*the same command goes on"):
        with exhaustion.named("runs/a", "config.train.batch_size=8"):
            raise error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((9,), np.dtype("f4")),
        RuntimeError("std::bad_alloc"),
        jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 3600000000 bytes."
        ),
    ],
)
def test_a_lack_of_memory_names_the_batch(error):
    config = default_config()
    said = (
        "out of memory with config.train.batch_size=8 images at a time; set "
        "config.train.microbatch_size to fewer, or config.remat, now auto, to step or block"
    )
    with pytest.raises(UserError, match=said):
        with exhaustion.named("runs/a", exhaustion.images_of(config), config.remat):
            raise error
    config.train.microbatch_size = 2
    assert exhaustion.images_of(config) == "config.train.microbatch_size=2"


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(2, "No such file"), KeyError])
def test_what_is_something_else_stays_what_it_is(error):
    with pytest.raises(error if isinstance(error, type) else type(error)):
        with exhaustion.named("runs/a", "x=1"):
            raise error


def test_a_users_error_stays_what_it_is():
    with pytest.raises(UserError, match="^out of memory, says the user$"):
        with exhaustion.named("runs/a", "x=1"):
            raise UserError("out of memory, says the user")


MUCH = """
import resource
import jax, jax.numpy as jnp
from alignprop_jax.records import exhaustion
product = jax.jit(lambda x: jnp.outer(x, x) @ jnp.outer(x, x)).lower(jnp.ones(30000)).compile()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmSize"].split()[0]) * 1024 + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
with exhaustion.named("runs/a", "x=1"):
    product(jnp.ones(30000)).block_until_ready()
"""


def test_xla_without_memory_is_understood():
    process = subprocess.run([sys.executable, "-c", MUCH], capture_output=True, text=True)
    assert process.stderr.endswith(
        "UserError: out of memory with x=1 images at a time; set fewer\n"
    )

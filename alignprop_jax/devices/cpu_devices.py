"""All cores of a CPU: one device each, which takes its share of the batch.

XLA leaves cores idle where one device has them all: of two cores an update is 20 to 50% faster with
a device for each. Each holds a copy of the weights.
"""

import os
import re

import jax

from alignprop_jax.devices.compilation import cpu_flags


def use_cores(samples: int, fsdp: int) -> None:
    """Gives each core a device, or as many as the images in memory at a time divide among.

    To be called before anything is computed; later, and in a run of several hosts, it does nothing.
    Where $XLA_FLAGS or $JAX_NUM_CPU_DEVICES choose a number of devices, that stays. Accelerators
    are not affected.

    XLA gets at least one thread more than there are devices, unless $PJRT_NPROC says otherwise or
    the CPU has AVX-512. With as many threads as devices, and convolutions that are XLA 0.10's own
    and not YNNPACK's (see `compilation.compiler_options`), a gradient of the emoji model was
    another in each run, its norm up to 12% off (docs/performance_log.md).
    """
    if jax.distributed.is_initialized():
        return
    cores, number = len(os.sched_getaffinity(0)), _chosen_number()
    if number is None:
        number = num_devices(samples, fsdp, cores)
        try:
            jax.config.update("jax_num_cpu_devices", number)
        except RuntimeError:  # The devices are in use.
            return
    spare = "avx512f" not in cpu_flags()
    os.environ.setdefault("PJRT_NPROC", str(max(cores, number + spare)))


def num_devices(samples: int, fsdp: int, cores: int) -> int:
    """The largest number, up to that of the cores, that the samples in memory divide by."""
    fitting = (n for n in range(cores, 0, -1) if samples % n == 0 and n % fsdp == 0)
    return next(fitting, 1)


def _chosen_number() -> int | None:
    """That of the user, None where it is left to us."""
    if number := os.environ.get("JAX_NUM_CPU_DEVICES"):
        return int(number)
    flags = os.environ.get("XLA_FLAGS", "")
    match = re.search(r"xla_force_host_platform_device_count=(\d+)", flags)
    return int(match[1]) if match else None

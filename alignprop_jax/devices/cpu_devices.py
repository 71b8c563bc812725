"""All cores of a CPU: one device each, which takes its share of the batch.

XLA leaves cores idle where one device has them all: of two cores an update is 20 to 40% faster with
a device for each (docs/performance.md). Each holds a copy of the weights.
"""

import os

import jax
from ml_collections import ConfigDict

from alignprop_jax.algorithms.presets import WITHOUT_REWARD_GRADIENT


def use_cores(config: ConfigDict) -> None:
    """Gives each core a device, or as many as the images in memory at a time divide among.

    To be called before anything is computed; later, in a run of several hosts, and where $XLA_FLAGS
    or $JAX_NUM_CPU_DEVICES choose a number, it does nothing. Accelerators are not affected.
    """
    chosen = "JAX_NUM_CPU_DEVICES" in os.environ
    chosen |= "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or jax.distributed.is_initialized():
        return
    try:
        jax.config.update("jax_num_cpu_devices", num_devices(config, len(os.sched_getaffinity(0))))
    except RuntimeError:  # The devices are in use.
        return


def num_devices(config: ConfigDict, cores: int) -> int:
    """The largest number, up to that of the cores, that the images in memory divide by."""
    images = config.train.microbatch_size or config.train.batch_size
    if config.algorithm in WITHOUT_REWARD_GRADIENT:
        images //= max(1, config.rollouts.minibatches)
    fitting = (n for n in range(cores, 0, -1) if images % n == 0 and n % config.mesh.fsdp == 0)
    return next(fitting, 1)

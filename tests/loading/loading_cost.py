"""A process that loads a model once and prints what that cost, as JSON.

python -m tests.loading.loading_cost MODEL DTYPE
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.nn.execution import Execution


def memory(key):
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def main():
    model, dtype = sys.argv[1:]
    load_stable_diffusion("emoji")  # whatever is imported and compiled at first use
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = memory("VmRSS")
    start, start_cpu = time.monotonic(), time.process_time()
    _, params, _ = load_stable_diffusion(model, Execution(jnp.dtype(dtype)))
    jax.block_until_ready(params)
    print(
        json.dumps(
            {
                "seconds": time.monotonic() - start,
                "cpu_seconds": time.process_time() - start_cpu,
                "params_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
                "peak_bytes": memory("VmHWM") - before,
            }
        )
    )


if __name__ == "__main__":
    main()

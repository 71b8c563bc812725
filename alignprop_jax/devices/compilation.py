"""How programs are compiled, kept on disk, and what compiling leaves behind."""

import contextlib
import ctypes
import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax

_LEAST_SECONDS = "jax_persistent_cache_min_compile_time_secs"


def enable_compilation_cache() -> None:
    """Turns on JAX's persistent cache, in $JAX_COMPILATION_CACHE_DIR if the user chose a place.

    Otherwise it lies in $XDG_CACHE_HOME/alignprop_jax/xla, by default under ~/.cache. A folder that
    cannot be written costs the cache, not the run. Programs are kept that took a tenth of a second
    to compile, unless $JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says otherwise.
    """
    if _LEAST_SECONDS.upper() not in os.environ:
        # Those of less than JAX's second, of which a run has a dozen, add up to several.
        jax.config.update(_LEAST_SECONDS, 0.1)
    if jax.config.jax_compilation_cache_dir:
        return
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache_home) / "alignprop_jax" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def compiler_options() -> dict[str, str]:
    """What XLA is told beyond its defaults on the devices at hand, as `jax.jit` takes it.

    On CPUs it hands convolutions, products and sums to the library YNNPACK. That takes a fifth less
    time than its own where there is AVX-512, and up to twice the time where there is only AVX2
    (docs/performance_log.md).
    """
    if jax.default_backend() != "cpu":
        return {}
    flags = cpu_flags()
    if "avx512f" in flags or "avx2" not in flags:
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": ""}


@functools.cache
def cpu_flags() -> list[str]:
    """Extensions of the instruction set, by their names in Linux; empty where it does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """For tracing, whose millions of objects stay: to look at them takes 30% of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def release_freed_memory() -> None:
    """Gives back to the system what compiling has freed, 0.7 GB of a small model's train step.

    glibc keeps it, in pieces too small for the arrays of a run, which would come on top of it.
    Elsewhere there is nothing to do.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

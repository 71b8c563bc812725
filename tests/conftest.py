"""What every test runs under: CPU, strict rank promotion, compiled programs kept on disk."""

import os
from pathlib import Path

# Before jax is imported; programs that tests start as processes inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alignprop_jax/tests"),
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# Quick answers about local folders only: no test may need the network.
os.environ["HF_HUB_OFFLINE"] = "1"

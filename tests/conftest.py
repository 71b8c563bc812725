"""What every test runs under: CPU, strict rank promotion, compiled programs kept on disk."""

import os
import signal
from pathlib import Path

# A shell has what it starts in the background ignore Ctrl-C, and processes hand that down.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before jax is imported; programs that tests start as processes inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alignprop_jax/tests"),
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Most of a test's time is LLVM's, on programs that run for less than they took to compile.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
# Workers have a core each, and threads of PyTorch that share one wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Quick answers about local folders only: no test may need the network.
os.environ["HF_HUB_OFFLINE"] = "1"

# After the settings above, which jax reads when it is imported.
import pytest  # noqa: E402

from tests import chromium, nano_run  # noqa: E402


@pytest.fixture(scope="session")
def nano_config(tmp_path_factory):
    """The config file of a run of seconds; beside it are its model, prompts and rewards."""
    pytest.importorskip("torch")
    return nano_run.write_nano_project(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="session")
def finished_run(nano_config, tmp_path_factory):
    """The workdir of a run that was never stopped, and what it printed. Not to be changed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    process = nano_run.run("train", nano_config, workdir)
    assert process.returncode == 0, process.stderr
    return workdir, process.stdout


@pytest.fixture(scope="session")
def browser():
    with chromium.launch() as browser:
        yield browser

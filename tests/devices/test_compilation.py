import gc
import os
import platform
import sys
from pathlib import Path

import jax
import pytest

from alignprop_jax.devices import compilation
from alignprop_jax.devices.compilation import (
    compiler_options,
    enable_compilation_cache,
    garbage_collection_paused,
    release_freed_memory,
)


@pytest.fixture(autouse=True)
def restored_setting():
    chosen = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", chosen)


def test_a_place_the_user_chose_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "/chosen")
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == "/chosen"


def test_default_is_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "alignprop_jax" / "xla")


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", None)
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize(
    "cpu, by_library", [("fma avx2", False), ("avx2 avx512f", True), ("asimd", True)]
)
def test_xla_computes_products_itself_where_its_library_is_slow(monkeypatch, cpu, by_library):
    monkeypatch.setattr(compilation, "cpu_flags", cpu.split)
    x = jax.ShapeDtypeStruct((256, 256), "float32")
    compiled = jax.jit(lambda x: x @ x).lower(x).compile(compiler_options())
    assert ("ynn" in compiled.as_text()) == by_library


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_the_cpu_can_do_is_known():
    flags = compilation.cpu_flags()
    assert flags or platform.machine() != "x86_64"
    assert all(flag in Path("/proc/cpuinfo").read_text() for flag in flags)


def test_garbage_collection_goes_on_after_an_error_too():
    with pytest.raises(ValueError), garbage_collection_paused():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()


def test_garbage_collection_that_was_off_stays_off():
    gc.disable()
    try:
        with garbage_collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc; trims glibc's heap")
def test_what_was_freed_is_given_back():
    """Pieces too small to be mapped by themselves, freed behind one that is still in use."""
    pieces = [b"x" * (100_000 + i % 2) for i in range(2000)]
    still_used = b"x" * 100_002
    before = resident_bytes()
    del pieces
    release_freed_memory()
    assert before - resident_bytes() > 150e6
    del still_used

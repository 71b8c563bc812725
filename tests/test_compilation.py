import jax
import pytest

from alignprop_jax.compilation import enable_compilation_cache


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

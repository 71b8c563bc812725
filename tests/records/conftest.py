"""fsspec's file system in memory stands for Cloud Storage."""

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))

    def _open(self, path, mode="rb", **kwargs):
        assert "a" not in mode, "an object cannot be appended to"
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setenv("EPATH_USE_TF", "false")
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]  # the folders that an earlier test made
    return Bucket.store

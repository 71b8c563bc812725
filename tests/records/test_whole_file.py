import pytest

from alignprop_jax.loading.whole_file import whole_file


@pytest.mark.parametrize("folder", ["{tmp}", "gs://bucket/run"])
def test_a_file_that_is_not_done_leaves_what_was_there(folder, tmp_path, bucket):
    from etils import epath

    path = epath.Path(folder.format(tmp=tmp_path)) / "picture.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    for content in (b"first", b"second"):
        with whole_file(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    with pytest.raises(OSError), whole_file(path) as file:
        file.write(b"half")
        raise OSError("the disk is full")
    assert path.read_bytes() == b"second"
    assert [other.name for other in path.parent.iterdir()] == ["picture.png"]

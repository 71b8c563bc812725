"""The workdir: in a bucket, for which fsspec's file system in memory stands, and damaged."""

import numpy as np
from PIL import Image
from safetensors.numpy import load

from alignprop_jax.config import default_config
from alignprop_jax.lora.files import save_lora
from alignprop_jax.records.workdir import Workdir


def test_a_workdir_in_a_bucket(bucket):
    workdir = Workdir("gs://bucket/run")
    for step in (1, 2, 3):
        workdir.metrics.append({"step": step})
    workdir.save_summary({"steps": 3})
    assert workdir.load_summary() == {"steps": 3}
    workdir.reward_parts.write_text("{}")
    again = Workdir("gs://bucket/run")
    again.rewind(2)
    assert again.metrics.read() == [{"step": 1}, {"step": 2}]
    assert again.load_summary() is None
    assert again.reward_parts.exists()
    again.rewind(-1)
    assert again.metrics.read() == [] and not again.reward_parts.exists()

    images = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    workdir.save_before({"train": images})
    shapes = {"train": images.shape}
    np.testing.assert_array_equal(workdir.load_before(shapes)["train"], images)
    workdir.save_image("grid", Image.fromarray(images[0]))
    with (workdir.images / "grid.png").open("rb") as file:
        np.testing.assert_array_equal(np.asarray(Image.open(file)), images[0])
    layer = {"down": np.ones((3, 2), np.float32), "up": np.ones((2, 4), np.float32)}
    save_lora(workdir.lora, {"mid_block": {"to_q": layer}}, 4.0, {"reward": "redness"})
    tensors = load(workdir.lora.read_bytes())
    np.testing.assert_array_equal(tensors["unet.mid_block.to_q.lora_B.weight"], 2.0)
    assert not [name for name in bucket if name.endswith((".writable", ".tmp"))]


def test_images_of_before_that_cannot_be_used_are_none(tmp_path, capsys):
    workdir = Workdir(tmp_path)
    images = np.zeros((3, 8, 8, 3), np.uint8)
    workdir.save_before({"train": images})
    file = tmp_path / "images" / "before.npz"
    whole = file.read_bytes()
    assert workdir.load_before({"train": images.shape})["train"].shape == images.shape
    for shapes in ({"train": (2, 8, 8, 3)}, {"unseen": images.shape}, {}):
        assert workdir.load_before(shapes) is None
    for damaged in (b"", b"\0" * 90, whole[:60], whole[:-30], b"PK" + whole[9:], b"\x80\x04N."):
        file.write_bytes(damaged)
        assert workdir.load_before({"train": images.shape}) is None
    file.unlink()
    assert workdir.load_before({"train": images.shape}) is None
    assert f"note: {file} cannot be used (No such file or directory)" in capsys.readouterr().out


def test_a_record_that_is_missing_is_named(tmp_path, capsys):
    workdir = Workdir(tmp_path)
    for step in (1, 2, 5, 6, 7):
        workdir.metrics.append({"step": step, "step_seconds": 0.5})
    workdir.rewind(6)
    assert [record["step"] for record in workdir.metrics.read()] == [1, 2, 5, 6]
    assert "metrics.jsonl has no record of step 3 and 1 more" in capsys.readouterr().out


def test_a_folder_has_a_run_from_its_first_checkpoint_on(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.save_config(default_config(), {})
    workdir.metrics.append({"step": 1})
    assert not workdir.has_run()
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not workdir.has_run()
    (tmp_path / "checkpoints" / "2").mkdir()
    assert workdir.has_run()
    other = Workdir(tmp_path / "other")
    other.save_summary({"steps": 2})
    assert other.has_run()

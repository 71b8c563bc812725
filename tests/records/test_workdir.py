"""The workdir in a bucket."""

import numpy as np
from PIL import Image
from safetensors.numpy import load

from alignprop_jax.evaluation.evaluator import Evaluation
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
    workdir.save_before({"train": Evaluation(["a cat"], {}, images)})
    np.testing.assert_array_equal(workdir.load_before()["train"], images)
    workdir.save_image("grid", Image.fromarray(images[0]))
    with (workdir.images / "grid.png").open("rb") as file:
        np.testing.assert_array_equal(np.asarray(Image.open(file)), images[0])
    layer = {"down": np.ones((3, 2), np.float32), "up": np.ones((2, 4), np.float32)}
    save_lora(workdir.lora, {"mid_block": {"to_q": layer}}, 4.0, {"reward": "redness"})
    tensors = load(workdir.lora.read_bytes())
    np.testing.assert_array_equal(tensors["unet.mid_block.to_q.lora_B.weight"], 2.0)
    assert not [name for name in bucket if name.endswith((".writable", ".tmp"))]

"""What the detector is taught: which patch an object belongs to, and the focal loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.nn.owlvit import Detections
from examples.emoji.detection import (
    make_detection_batches,
    make_detection_loss,
    query_texts,
)
from examples.emoji.scenes import SceneMixture
from tests.synthetic_scenes import NAMES, make_scenes

EDGE, NUM_NAMES = 8, 3


class DetectionsAsParams:
    """A stand-in for OWL-ViT that finds what its parameters say."""

    class config:  # noqa: N801
        class vision:  # noqa: N801
            image_size, patch_size = 64, 8

    def apply(self, variables, pixel_values, queries, method):
        found = variables["params"]["found"]
        return Detections(found["boxes"], found["logits"], None)


def loss_of(boxes, logits, batch):
    loss_fn = make_detection_loss(DetectionsAsParams(), {}, jnp.zeros((2 * NUM_NAMES, 5)), 0.0)
    params = {"found": {"boxes": boxes, "logits": logits}, "owlvit": {}}
    return loss_fn(params, batch, jax.random.key(0))


def test_loss_is_the_sum_over_patches_of_the_papers_terms():
    rng = np.random.default_rng(0)
    boxes = rng.uniform(size=(2, EDGE**2, 4)).astype(np.float32)
    logits = rng.normal(0, 2, (2, EDGE**2, NUM_NAMES)).astype(np.float32)
    # A box of one patch at rows 2 to 3: untrained, it belongs to the patch in row 2, column 1.
    objects = np.zeros((2, 4, 4), np.float32)
    objects[0, 0] = [2.1 / EDGE, 2.9 / EDGE, 0.1, 0.2]
    objects[0, 1] = [0.01, 0.99, 0.3, 0.3]
    objects[1, 0] = [0.5, 0.5, 0.9, 0.9]
    names = np.array([[2, 0, -1, -1], [1, -1, -1, -1]], np.int32)
    images = np.zeros((2, 64, 64, 3), np.uint8)
    loss, metrics = loss_of(boxes, logits, (images, objects, names))

    owners = {(0, 2 * EDGE + 1): (2, 0), (0, 7 * EDGE): (0, 1), (1, 3 * EDGE + 3): (1, 0)}
    focal = box = 0.0
    for image in range(2):
        for patch in range(EDGE**2):
            name, slot = owners.get((image, patch), (None, None))
            for query in range(NUM_NAMES):
                p = 1 / (1 + np.exp(-logits[image, patch, query]))
                focal -= (
                    0.25 * (1 - p) ** 2 * np.log(p)
                    if query == name
                    else 0.75 * p**2 * np.log(1 - p)
                )
            if slot is not None:
                box += np.abs(boxes[image, patch] - objects[image, slot]).sum()
    assert float(metrics["focal"]) == pytest.approx(focal / 3, rel=1e-4)
    assert float(metrics["box"]) == pytest.approx(box / 3, rel=1e-4)
    assert float(loss) == pytest.approx(focal / 3 + 5 * box / 3, rel=1e-4)


def test_batches_say_where_each_object_is():
    mixture = SceneMixture(single=1, count=1, pair=1)
    batch_fn = make_detection_batches(make_scenes(mixture), sorted(NAMES), 64)
    images, boxes, names = batch_fn(np.random.default_rng(0))
    assert images.shape == (64, 64, 64, 3) and boxes.shape == (64, 4, 4)
    numbers = (names >= 0).sum(-1)
    assert set(numbers) == {1, 2, 3, 4}
    # The sprites are discs: dark in the middle of the box, bright at its corners.
    for image, own, labels in zip(images, boxes, names, strict=True):
        for x, y, width, height in own[labels >= 0] * 64:
            assert image[int(y), int(x)].min() < 50
            corner = image[int(y - height / 2), int(x - width / 2)]
            assert corner.min() == 255 or own[1].any()
        assert not own[labels < 0].any()


def test_queries_are_names_and_then_plurals():
    assert query_texts(["cat", "mouse", "rice"]) == ["cat", "mouse", "rice", "cats", "mice", "rice"]

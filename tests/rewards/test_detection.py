"""Rewards on objects against transformers' detectors and a count by hand from their boxes."""

import jax
import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.rewards import check_reward, make_reward
from alignprop_jax.rewards.detection import _suppress_overlapping
from tests.rewards.owl_folder import write_owl_folder
from tests.torch_pipeline import torch

transformers = pytest.importorskip("transformers")

PROMPTS = ["two cats and a dog", "three ants", "a red cat, a dog and a bee"]
THRESHOLD = 0.4


@pytest.fixture(scope="module", params=["owlvit", "owlv2"])
def detector(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, write_owl_folder(folder, request.param)


def images():
    """Of the detector's own size, so that this is not about resizing."""
    return np.random.default_rng(1).uniform(size=(3, 24, 24, 3)).astype(np.float32)


def detect(folder, peer, names, pixels):
    """transformers' logits of one query an image and boxes, low and high corners."""
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(
        names, padding="max_length", max_length=16, return_tensors="pt"
    )
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    output = peer(input_ids=tokens.input_ids, pixel_values=(pixels - mean) / std)
    centre, size = output.pred_boxes.split(2, dim=-1)
    return output.logits[..., 0], torch.cat([centre - size / 2, centre + size / 2], -1).detach()


def survivors(logits, boxes):
    """Indices of the boxes that non-maximum suppression leaves, one pair at a time."""
    kept = []
    for index in torch.argsort(logits.detach(), descending=True).tolist():
        low = torch.maximum(boxes[index, :2], boxes[kept, :2])
        high = torch.minimum(boxes[index, 2:], boxes[kept, 2:])
        common = (high - low).clamp(min=0).prod(-1)
        areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
        if not (common / (areas[index] + areas[kept] - common) > 0.5).any():
            kept.append(index)
    return kept


def assert_equal_with_gradient(reward, expected, pixels):
    expected.sum().backward()
    inputs = reward.prepare(PROMPTS)
    score = jax.jit(reward.score)(reward.params, images(), inputs)
    np.testing.assert_allclose(score, expected.detach().numpy(), atol=1e-4)
    gradient = jax.jit(jax.grad(lambda x: reward.score(reward.params, x, inputs).sum()))(images())
    wanted = pixels.grad.numpy().transpose(0, 2, 3, 1)
    assert np.abs(wanted).max() > 0
    np.testing.assert_allclose(gradient, wanted, atol=1e-4 * np.abs(wanted).max())


def test_count_and_its_gradient(detector):
    folder, peer = detector
    wanted = [[("cats", 2), ("dog", 1)], [("ants", 3)], [("red cat", 1), ("dog", 1), ("bee", 1)]]
    pixels = torch.tensor(images().transpose(0, 3, 1, 2), requires_grad=True)
    middle = np.log(THRESHOLD / (1 - THRESHOLD))
    expected = []
    for row, things in enumerate(wanted):
        distance = 0.0
        for name, number in things:
            logits, boxes = detect(folder, peer, [name], pixels[row : row + 1])
            kept = survivors(logits[0], boxes[0])
            counts = torch.sigmoid((logits[0, kept] - middle) / 0.5)
            distance = distance + (counts.sum() - number).abs()
        expected.append(-distance)
    options = {"count": {"detector": str(folder), "threshold": THRESHOLD}}
    assert_equal_with_gradient(make_reward("count", None, options), torch.stack(expected), pixels)


def test_remove_and_its_gradient(detector):
    folder, peer = detector
    rest = [["cats"], ["ants"], ["red cat", "bee"]]
    pixels = torch.tensor(images().transpose(0, 3, 1, 2), requires_grad=True)
    expected = []
    for row, names in enumerate(rest):
        seen = [
            torch.sigmoid(detect(folder, peer, [name], pixels[row : row + 1])[0].max())
            for name in ["dog", *names]
        ]
        expected.append(torch.stack(seen[1:]).mean() - seen[0])
    options = {"remove": {"detector": str(folder), "concept": "dog"}}
    assert_equal_with_gradient(make_reward("remove", None, options), torch.stack(expected), pixels)


def test_suppression_is_one_pair_at_a_time():
    """A chain: the second falls to the first, so it does not take the third with it."""
    centres = np.array([0.2, 0.25, 0.3, 0.8])
    boxes = np.array([[x, 0.5, 0.2, 0.2] for x in centres], np.float32)
    assert np.asarray(_suppress_overlapping(boxes)).tolist() == [True, False, True, True]


def test_no_more_is_counted_than_can_be_found(detector):
    reward = make_reward("count", None, {"count": {"detector": str(detector[0])}})
    assert reward.prepare(["64 dogs"])["numbers"] == 64
    with pytest.raises(UserError, match="'65 dogs' asks for 65 dogs; at most 64"):
        reward.prepare(["a cat", "65 dogs"])


def test_a_number_for_every_prompt(detector):
    reward = make_reward("count", None, {"count": {"detector": str(detector[0]), "number": 4}})
    np.testing.assert_array_equal(reward.prepare(["the cats", "a dog"])["numbers"], [[4], [4]])


def test_no_text_tower_in_the_step(detector):
    reward = make_reward("remove", None, {"remove": {"detector": str(detector[0]), "concept": "x"}})
    (tower,) = (tree for name, tree in reward.params.items() if name.startswith("owl"))
    assert "text_model" not in tower and "vision_model" in tower
    check_reward(reward, (32, 32, 3))


def test_prompts_that_do_not_say_how_many(detector):
    reward = make_reward("count", None, {"count": {"detector": str(detector[0])}})
    with pytest.raises(UserError, match="'some cats' does not say how many"):
        reward.prepare(["a dog", "some cats"])


def test_nothing_to_remove():
    with pytest.raises(UserError, match="give config.remove.concept"):
        make_reward("remove", None)

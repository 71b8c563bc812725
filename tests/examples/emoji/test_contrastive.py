"""CLIP's loss against a derivation in NumPy, and what its batches say of their pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.loading.tokenizer import load_tokenizer
from examples.emoji.captions import caption_words
from examples.emoji.colors import COLORS
from examples.emoji.contrastive import (
    _describe,
    make_caption_batches,
    make_contrastive_loss,
)
from examples.emoji.tokenizer import build_tokenizer
from tests.synthetic_scenes import make_scenes

KEY = jax.random.key(0)
# The second and the fourth caption are equal.
INPUT_IDS = np.array([[1, 2, 9], [1, 3, 9], [1, 4, 9], [1, 3, 9], [1, 2, 8]], np.int32)


class LogitsAsParams:
    """A stand-in for CLIP whose logits [image, text] are parameters; remembers its inputs."""

    def apply(self, variables, input_ids, pixel_values):
        self.input_ids, self.pixel_values = input_ids, pixel_values
        return sum(variables["params"].values())


def images(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size, 8, 8, 3)).astype(np.uint8)


def cross_entropy(logits, same):
    """Of each row, shared equally by the columns that hold its caption."""
    total = 0.0
    for row, equal in zip(logits, same, strict=True):
        probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        total -= np.mean([np.log(probabilities[column]) for column in np.flatnonzero(equal)])
    return total / len(logits)


def test_loss_is_the_mean_of_both_cross_entropies_with_shared_targets():
    logits = np.random.default_rng(0).normal(0, 3, (5, 5))
    same = [[tuple(a) == tuple(b) for b in INPUT_IDS] for a in INPUT_IDS]
    expected = (cross_entropy(logits, same) + cross_entropy(logits.T, same)) / 2
    unshared = (cross_entropy(logits, np.eye(5)) + cross_entropy(logits.T, np.eye(5))) / 2
    loss_fn = make_contrastive_loss(LogitsAsParams())
    loss, _ = loss_fn({"logits": jnp.asarray(logits)}, (images(5), INPUT_IDS), KEY)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(unshared, rel=1e-2)


def test_frozen_parameters_take_part_and_are_not_trained():
    rng = np.random.default_rng(0)
    text, image = (jnp.asarray(rng.normal(0, 3, (5, 5)), jnp.float32) for _ in range(2))
    batch = images(5), INPUT_IDS
    whole, _ = make_contrastive_loss(LogitsAsParams())({"text": text, "image": image}, batch, KEY)
    loss_fn = make_contrastive_loss(LogitsAsParams(), frozen={"text": text})
    (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)({"image": image}, batch, KEY)
    assert float(loss) == pytest.approx(float(whole))
    assert gradient.keys() == {"image"}
    assert np.abs(gradient["image"]).max() > 0.01


def test_images_of_one_caption_are_not_told_apart():
    """Where all captions are equal nothing can be learnt, and the loss is the entropy, log B."""
    equal = np.repeat(INPUT_IDS[:1], 4, axis=0)
    loss_fn = make_contrastive_loss(LogitsAsParams())
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    params = {"logits": jnp.zeros((4, 4))}
    (loss, _), gradient = value_and_grad(params, (images(4), equal), KEY)
    assert float(loss) == pytest.approx(np.log(4))
    np.testing.assert_allclose(gradient["logits"], np.zeros((4, 4)), atol=1e-7)


def test_accuracy_counts_an_equal_caption_as_found():
    logits = np.zeros((5, 5))
    for image, text in enumerate([0, 3, 2, 1, 2]):  # the last one is wrong
        logits[image, text] = 5.0
    loss_fn = make_contrastive_loss(LogitsAsParams())
    _, metrics = loss_fn({"logits": jnp.asarray(logits)}, (images(5), INPUT_IDS), KEY)
    assert float(metrics["accuracy"]) == pytest.approx(0.8)


def test_pixels_run_from_minus_one_to_one_with_a_little_noise():
    model = LogitsAsParams()
    batch = images(5)
    make_contrastive_loss(model)({"logits": jnp.zeros((5, 5))}, (batch, INPUT_IDS), KEY)
    noise = np.asarray(model.pixel_values) - (batch / 255 * 2 - 1)
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert 0.04 < noise.std() < 0.08
    np.testing.assert_array_equal(model.input_ids, INPUT_IDS)


@pytest.mark.parametrize(
    ("caption", "adjective", "described"),
    [
        ("a cat", "glossy", "a glossy cat"),
        ("an ant", "blurry", "a blurry ant"),
        ("an orange fox", "flat", "a flat orange fox"),
        ("some rice", "noisy", "some noisy rice"),
        ("two dogs", "flat", "two flat dogs"),
        ("a cat and an owl", "faded", "a faded cat and an owl"),
        ("an ant on an orange background", "flat", "a flat ant on an orange background"),
    ],
)
def test_adjective_follows_the_first_word(caption, adjective, described):
    assert _describe(caption, adjective) == described


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(caption_words(), folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def make_batch(tokenizer):
    def make(seed=0, size=150, **shares):
        batch_fn = make_caption_batches(make_scenes(), tokenizer, size, **shares)
        pictures, input_ids = batch_fn(np.random.default_rng(seed))
        return pictures, input_ids, tokenizer.batch_decode(input_ids, skip_special_tokens=True)

    return make


def mentions(captions, words):
    return np.array([any(word in caption.split() for word in words) for caption in captions])


def test_plain_captions_are_those_of_the_scenes(make_batch):
    pictures, input_ids, captions = make_batch(style_share=0.0, degraded_share=0.0)
    assert pictures.shape == (150, 64, 64, 3) and pictures.dtype == np.uint8
    assert input_ids.shape == (150, 16) and input_ids.dtype == np.int32
    assert not mentions(captions, ["flat", "glossy", "blurry", "faded", "noisy"]).any()
    assert mentions(captions, ["ant", "ants", "cat", "cats", "grapes", "kiwi", "kiwis"]).all()


def test_style_in_a_caption_is_that_of_its_picture(make_batch):
    pictures, _, captions = make_batch(style_share=1.0, degraded_share=0.0)
    glossy, flat = mentions(captions, ["glossy"]), mentions(captions, ["flat"])
    assert (glossy ^ flat).all()
    # On white and not tinted, glossy discs are blue and flat ones red.
    natural = ~mentions(captions, [*COLORS, "background"])
    mean = pictures[natural].astype(float).mean(axis=(1, 2))
    assert 20 < natural.sum()
    np.testing.assert_array_equal(mean[:, 2] > mean[:, 0], glossy[natural])


def test_shares_of_spoilt_and_of_styled_captions(make_batch):
    _, _, captions = make_batch(size=600, style_share=0.5, degraded_share=0.3)
    spoilt = mentions(captions, ["blurry", "faded", "noisy"])
    styled = mentions(captions, ["flat", "glossy"])
    assert not (spoilt & styled).any()
    assert spoilt.mean() == pytest.approx(0.3, abs=0.06)
    assert styled.mean() == pytest.approx(0.5, abs=0.06)


def test_spoilt_pictures_carry_the_word(make_batch):
    pictures, _, captions = make_batch(size=200, style_share=0.0, degraded_share=1.0)
    assert mentions(captions, ["blurry", "faded", "noisy"]).all()
    steps = np.abs(np.diff(pictures.astype(float), axis=1)).mean(axis=(1, 2, 3))
    noisy, blurry = mentions(captions, ["noisy"]), mentions(captions, ["blurry"])
    assert np.median(steps[noisy]) > 2 * np.median(steps[blurry])


def test_batches_depend_on_the_generator_alone(make_batch):
    shares = {"style_share": 0.3, "degraded_share": 0.3, "size": 20}
    pictures, input_ids, _ = make_batch(seed=3, **shares)
    again, input_ids_again, _ = make_batch(seed=3, **shares)
    np.testing.assert_array_equal(pictures, again)
    np.testing.assert_array_equal(input_ids, input_ids_again)
    assert (make_batch(seed=4, **shares)[0] != pictures).any()

"""The judges as scorers: which prompts they answer, and how they are read."""

import json

import jax
import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.evaluation.judges import (
    COUNTS,
    NOTHING,
    ConvClassifier,
    Judge,
    load_judges,
    removal_judges,
)
from alignprop_jax.loading.pretrained import resolve_network
from alignprop_jax.loading.weights import save_params
from alignprop_jax.rewards import make_reward

ANIMALS = ("cat", "rat", "ant", "mouse")
CLASSES = {
    "recognizer": ("cat", "rat", "ant", NOTHING),
    "style": ("flat", "glossy", NOTHING),
    "counter": COUNTS,
    "finder": ANIMALS,
}


@pytest.fixture
def folder(tmp_path):
    """Judges with random weights."""
    for seed, (name, classes) in enumerate(CLASSES.items()):
        model = ConvClassifier(len(classes))
        rng = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda leaf, rng=rng: rng.normal(size=leaf.shape), model.abstract_params()
        )
        save_params(params, tmp_path / f"{name}.safetensors", np.float16)
    config = {name: {"classes": classes} for name, classes in CLASSES.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "clip").symlink_to(resolve_network("emoji", "scene_clip"))
    return tmp_path


def images(number=12, size=64):
    rng = np.random.default_rng(7)
    colors = rng.uniform(size=(number, 1, 1, 3))
    return (colors * rng.uniform(0.5, 1, size=(number, size, size, 3))).astype(np.float32)


def test_scores_are_of_the_class_the_prompt_names(folder, monkeypatch):
    seen = {
        "recognizer": ["cat", "rat", NOTHING, "ant"],
        "style": ["glossy", "flat", NOTHING, "flat"],
    }
    monkeypatch.setattr(
        Judge,
        "classify",
        lambda self, images: seen["style" if "flat" in self.classes else "recognizer"],
    )
    scorers = load_judges(folder)
    prompts = ["A cat, on a mat", "an ant", "a rat", "the ant"]
    recognized = scorers["recognized"](images(4), prompts)
    assert recognized.dtype == np.float32 and recognized.tolist() == [1, 0, 0, 1]
    assert scorers["glossy"](images(4), prompts).tolist() == [1, 0, 0, 0]


def test_numbers_of_all_objects_together(folder, monkeypatch):
    monkeypatch.setattr(
        Judge, "classify", lambda self, images: ["two", "two", "four", "one", "one"]
    )
    prompts = ["two cats", "three mice", "two cats and 2 rats", "some ants", "five rats"]
    counted = load_judges(folder)["counted"](images(5), prompts)
    np.testing.assert_array_equal(counted, np.array([1, 0, 1, np.nan, np.nan], np.float32))


def test_share_of_the_animals_that_are_there(folder, monkeypatch):
    seen = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
    monkeypatch.setattr(Judge, "find", lambda self, images: seen)
    # One object alone is for the recognizer, and no one trained a judge of giants.
    prompts = ["a cat and a red rat", "two cats", "three mice", "a cat", "two giants"]
    found = load_judges(folder)["found"](images(5), prompts)
    np.testing.assert_array_equal(found, np.array([0.5, 1, 1, np.nan, np.nan], np.float32))

    judges = removal_judges(folder, "cat")
    concept = judges["concept_found"](images(5), prompts)
    rest = judges["rest_found"](images(5), prompts)
    np.testing.assert_array_equal(concept, [1, 1, 0, 1, 1])
    np.testing.assert_array_equal(rest, np.array([0, np.nan, 1, np.nan, np.nan], np.float32))
    assert removal_judges(folder, "giant") == {}


def test_agreement_is_the_cosine_of_a_clip_of_its_own(folder):
    reward = make_reward("clip_score", None)
    prompts = ["a cat", "a rat", "a cat"]
    expected = reward.score(reward.params, images(3), reward.prepare(prompts))
    agreement = load_judges(folder)["agreement"]
    for _ in range(2):  # the second time from embeddings it knows
        # Cosines, of which one is near zero.
        np.testing.assert_allclose(agreement(images(3), prompts), expected, rtol=0, atol=1e-6)


def test_finds_what_has_a_positive_logit(folder):
    judge = Judge.load(folder, "finder")
    pictures = images()
    logits = jax.jit(ConvClassifier(4).apply)({"params": judge.params}, pictures)
    np.testing.assert_array_equal(judge.find(pictures), np.asarray(logits) > 0)


def test_class_is_the_one_of_the_highest_logit(folder):
    judge = Judge.load(folder, "recognizer")
    pictures = images()
    logits = jax.jit(ConvClassifier(4).apply)({"params": judge.params}, pictures)
    assert judge.classify(pictures) == [judge.classes[index] for index in logits.argmax(-1)]


@pytest.mark.parametrize("prompt", ["a dog", "a cat and a rat", "a giant", "nothing", ""])
def test_prompts_that_name_no_one_animal_are_not_judged(folder, prompt):
    assert np.isnan(load_judges(folder)["recognized"](images(1), [prompt])).all()


def test_images_of_any_size(folder):
    small = images(2)
    large = np.repeat(np.repeat(small.mean((1, 2), keepdims=True) + 0 * small, 2, 1), 2, 2)
    judge = Judge.load(folder, "style")
    assert judge.classify(large) == judge.classify(large[:, ::2, ::2])


@pytest.mark.parametrize(
    "content, message",
    [(None, "config.json: cannot be read"), ("{}", "config.json: cannot be read")],
)
def test_folder_without_judges(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_judges(tmp_path)


def test_weights_of_another_number_of_classes(folder):
    config = json.loads((folder / "config.json").read_text())
    config["style"]["classes"] = ["flat", "glossy"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="head.* has shape .*3.* needs .*2"):
        load_judges(folder)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignprop_jax.loading.weights import save_params
from alignprop_jax.rewards.aesthetic import apply_head, load_head
from examples.emoji.aesthetic_head import (
    FLAT_SCORE,
    GLOSSY_SCORE,
    SPOILT_SCORE,
    aesthetic_loss,
    embed_scenes,
    init_head,
    make_embedding_batches,
)
from examples.emoji.fit import Recipe, fit
from tests.synthetic_scenes import make_scenes

WIDTHS = (8, 6, 6, 6, 6, 1)


class MeanColor:
    """A stand-in for CLIP: the image embedding is the mean colour, and how rough the picture is."""

    def apply(self, variables, pixels, method):
        assert method == "get_image_features"
        roughness = jnp.abs(jnp.diff(pixels, axis=2)).mean(axis=(1, 2, 3))
        return variables["params"] * jnp.concatenate(
            [pixels.mean(axis=(1, 2)), roughness[:, None]], axis=1
        )


def test_new_head_has_the_widths_and_starts_between_the_scores():
    head = init_head(0, WIDTHS)
    shapes = [head[f"layers.{number}"]["kernel"].shape for number in (0, 2, 4, 6, 7)]
    assert shapes == list(zip(WIDTHS[:-1], WIDTHS[1:], strict=True))
    embeddings = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    scores = apply_head([head[name] for name in sorted(head)], embeddings)
    assert float(scores.mean()) == pytest.approx((GLOSSY_SCORE + FLAT_SCORE) / 2, abs=0.5)
    other = init_head(1, WIDTHS)
    assert (head["layers.0"]["kernel"] != other["layers.0"]["kernel"]).any()
    with pytest.raises(ValueError):
        init_head(0, WIDTHS[1:])


def test_loss_is_the_mean_squared_error_of_scores_of_unit_embeddings():
    head = init_head(0, WIDTHS)
    rng = np.random.default_rng(0)
    embeddings = rng.normal(0, 5, size=(6, 8))
    scores = rng.uniform(1, 8, size=6)
    x = embeddings / np.sqrt((embeddings**2).sum(1, keepdims=True))
    for number in (0, 2, 4, 6, 7):
        layer = head[f"layers.{number}"]
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
    error = x[:, 0] - scores
    loss, metrics = aesthetic_loss(head, (jnp.asarray(embeddings), jnp.asarray(scores)), None)
    assert float(loss) == pytest.approx((error**2).mean(), rel=1e-4)
    assert float(metrics["mean_error"]) == pytest.approx(np.abs(error).mean(), rel=1e-4)


def test_training_separates_embeddings_and_the_file_keeps_the_scores(tmp_path):
    rng = np.random.default_rng(0)
    kind = rng.integers(3, size=600)
    directions = np.linalg.qr(rng.normal(size=(8, 8)))[0][:3]
    lengths = rng.uniform(2, 20, size=(600, 1))
    embeddings = lengths * (directions[kind] + rng.normal(0, 0.05, size=(600, 8)))
    embeddings = embeddings.astype(np.float32)
    scores = np.array([GLOSSY_SCORE, FLAT_SCORE, SPOILT_SCORE], np.float32)[kind]
    recipe = Recipe(num_steps=300, batch_size=64, learning_rate=0.01, warmup_steps=20)
    head = fit(
        "head",
        recipe,
        aesthetic_loss,
        make_embedding_batches(embeddings[:400], scores[:400], recipe.batch_size),
        init_head(0, WIDTHS),
        tmp_path,
        seed=0,
    )
    save_params(head, tmp_path / "head.safetensors", np.float16)
    predicted = apply_head(load_head(tmp_path / "head.safetensors"), embeddings[400:])
    # Never seen, and half as far as two scores are from each other.
    assert np.abs(predicted - scores[400:]).max() < 1.0


def test_embeddings_of_scenes_have_the_scores_of_their_styles():
    embeddings, scores = embed_scenes(MeanColor(), 1.0, make_scenes(), 128, 0.0, seed=0)
    assert embeddings.shape == (128, 4) and scores.shape == (128,)
    assert scores.dtype == np.float32
    assert set(scores) == {GLOSSY_SCORE, FLAT_SCORE}
    assert (np.abs(embeddings[:, :3]) <= 1).all()
    # Glossy discs are blue and flat ones red, where neither colour nor background was changed.
    bluer = embeddings[:, 2] - embeddings[:, 0]
    assert bluer[scores == GLOSSY_SCORE].mean() > bluer[scores == FLAT_SCORE].mean() + 0.1


def test_share_of_scenes_is_spoilt_and_scores_lowest():
    embeddings, scores = embed_scenes(MeanColor(), 1.0, make_scenes(), 256, 0.4, seed=0)
    spoilt = scores == SPOILT_SCORE
    assert spoilt.mean() == pytest.approx(0.4, abs=0.08)
    # Noise makes rougher than any scene, blur makes smoother.
    roughness = embeddings[:, 3]
    assert roughness[spoilt].std() > 2 * roughness[~spoilt].std()
    again = embed_scenes(MeanColor(), 1.0, make_scenes(), 256, 0.4, seed=0)
    jax.tree.map(np.testing.assert_array_equal, again, (embeddings, scores))
    other, _ = embed_scenes(MeanColor(), 1.0, make_scenes(), 256, 0.4, seed=1)
    assert (other != embeddings).any()


def test_batches_keep_embeddings_with_their_scores():
    index = np.arange(50, dtype=np.float32)
    batch_fn = make_embedding_batches(np.stack([index, -index], 1), 10 * index, 400)
    embeddings, scores = batch_fn(np.random.default_rng(0))
    assert embeddings.shape == (400, 2)
    np.testing.assert_array_equal(embeddings[:, 0] * 10, scores)
    assert len(set(scores)) > 45

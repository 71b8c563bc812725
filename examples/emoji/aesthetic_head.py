"""Training the head of the aesthetic reward on the image embeddings of the small CLIP."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignprop_jax.nn.clip import CLIPModel
from alignprop_jax.rewards.aesthetic import apply_head
from examples.emoji.degrade import degrade
from examples.emoji.fit import BatchFn
from examples.emoji.pixels import to_pixel_values
from examples.emoji.scenes import SceneSampler

# Scores on the scale of LAION's predictor, which rates from 1 to 10.
GLOSSY_SCORE, FLAT_SCORE, SPOILT_SCORE = 8.0, 3.0, 1.0
# Five linear layers, named as LAION's are: what lies between is dropout there.
_LAYERS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")
_BATCH = 64

Head = dict[str, dict[str, Array]]


def init_head(seed: int, widths: tuple[int, ...]) -> Head:
    """The layers from `widths[0]` to `widths[-1]`, by name; the middle of the scores as bias."""
    keys = jax.random.split(jax.random.key(seed), len(_LAYERS))
    head = {}
    for name, key, fan_in, fan_out in zip(_LAYERS, keys, widths[:-1], widths[1:], strict=True):
        kernel = jax.random.normal(key, (fan_in, fan_out)) * fan_in**-0.5
        head[name] = {"kernel": kernel, "bias": jnp.zeros(fan_out)}
    head[_LAYERS[-1]]["bias"] += (GLOSSY_SCORE + FLAT_SCORE) / 2
    return head


def aesthetic_loss(head: Head, batch, key) -> tuple[Array, dict[str, Array]]:
    """Mean squared error of the scores of embeddings; a `LossFn`."""
    del key
    embeddings, scores = batch
    predicted = apply_head([head[name] for name in _LAYERS], embeddings)
    error = predicted - scores
    return (error**2).mean(), {"mean_error": jnp.abs(error).mean()}


def embed_scenes(
    model: CLIPModel,
    params,
    scenes: SceneSampler,
    num_scenes: int,
    spoilt_share: float,
    seed: int,
) -> tuple[Float[np.ndarray, "n p"], Float[np.ndarray, " n"]]:
    """Image embeddings of random scenes, some of them spoilt, and the scores they should have."""

    @jax.jit
    def embed(images):
        pixels = to_pixel_values(images)
        return model.apply({"params": params}, pixels, method="get_image_features")

    rng = np.random.default_rng([seed, num_scenes])
    embeddings, scores = [], []
    for _ in range(-(-num_scenes // _BATCH)):
        images = []
        for _ in range(_BATCH):
            scene = scenes.scene(rng)
            image = scene.image
            score = GLOSSY_SCORE if scene.factors["style"] == "glossy" else FLAT_SCORE
            if rng.random() < spoilt_share:
                image, _ = degrade(rng, image)
                score = SPOILT_SCORE
            images.append(image)
            scores.append(score)
        embeddings.append(np.asarray(embed(np.stack(images))))
    return np.concatenate(embeddings), np.array(scores, np.float32)


def make_embedding_batches(embeddings: np.ndarray, scores: np.ndarray, batch_size: int) -> BatchFn:
    """Random batches of embeddings [B, P] and scores [B]."""

    def batch_fn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.integers(len(scores), size=batch_size)
        return embeddings[chosen], scores[chosen]

    return batch_fn

import numpy as np

from examples.emoji.latents import encode_scenes
from tests.synthetic_scenes import make_scenes


class EveryEighthPixel:
    """A stand-in for the autoencoder: the mean of the latents is the picture made smaller."""

    def apply(self, variables, pixels, method):
        assert method == "encode"
        mean = variables["params"] * pixels[:, ::8, ::8]
        return mean, mean + 7.0


def encode(num_scenes=70, seed=0, scale=1.0, **settings):
    return encode_scenes(EveryEighthPixel(), scale, make_scenes(), num_scenes, seed, **settings)


def test_latents_are_means_of_the_scenes_that_the_captions_tell():
    latents, captions = encode()
    assert latents.shape == (70, 8, 8, 3) and latents.dtype == np.float16
    assert len(captions) == 70
    rng = np.random.default_rng([0, 70])
    images, texts = make_scenes().batch(rng, 70)
    assert captions == texts
    np.testing.assert_allclose(latents, images[:, ::8, ::8] / 127.5 - 1, atol=1e-3)
    assert encode(seed=1)[1] != captions


def test_cache_is_written_and_read(tmp_path):
    cache = tmp_path / "latents.npz"
    latents, captions = encode(cache=cache)
    assert [path.name for path in tmp_path.iterdir()] == ["latents.npz"]
    # Other weights show that nothing is encoded again.
    again, captions_again = encode(scale=2.0, cache=cache)
    np.testing.assert_array_equal(again, latents)
    assert captions_again == captions

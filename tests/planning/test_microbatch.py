"""The search for the largest microbatch, where memory is a line in the number of images."""

import pytest

from alignprop_jax.config import default_config
from alignprop_jax.planning import microbatch
from alignprop_jax.planning.arithmetic import Arithmetic
from alignprop_jax.planning.chips import GIB
from alignprop_jax.planning.estimate import Estimate
from alignprop_jax.planning.hlo_cycles import ProgramCost
from alignprop_jax.planning.topology import Topology

SLICE = Topology.parse("v5e:2x2")


def made_up(images, an_image, constant=0.0):
    """Of 2 GiB of weights, and temporaries in GiB."""
    memory = {"unet": 2 * GIB, "temporaries": int((constant + an_image * images) * GIB)}
    fits = sum(memory.values()) <= 16 * GIB
    cost = ProgramCost() if fits else None
    return Estimate(
        SLICE, images, 128, memory | {"vae": 0, "reward": 0}, fits, Arithmetic(1.0), cost, 1.0
    )


def search(monkeypatch, images, *line):
    compiled = []

    def estimate(config, topology):
        compiled.append(config.train.microbatch_size // 4)
        return made_up(compiled[-1], *line)

    monkeypatch.setattr(microbatch, "estimate_memory", estimate)
    config = default_config()
    config.train.batch_size, config.train.microbatch_size = 128, images * 4
    return microbatch.suggest_microbatch(config, made_up(images, *line)), compiled


@pytest.mark.parametrize(
    "images, line, best, compiled",
    [
        (4, (1.0,), 8, [8, 16]),  # 14 fit, of which 8 divides the share of 32
        (8, (1.0,), 8, [16]),
        (16, (1.0,), 8, [8]),  # it did not fit, and 8 does
        (4, (0.5, 6.0), 16, [4, 8, 16, 32]),  # less grows with the images than it seems
        (1, (0.01,), 32, [32]),  # all of them
        (2, (20.0,), None, [1]),
    ],
)
def test_the_largest_divisor_that_fits_is_found(monkeypatch, images, line, best, compiled):
    found, tried = search(monkeypatch, images, *line)
    assert (found and found.images_per_chip) == best
    assert [n for n in tried if n != images] == [n for n in compiled if n != images]


def test_advice_names_what_to_change(monkeypatch):
    config = default_config()
    config.train.batch_size = config.train.microbatch_size = 16
    result = made_up(4, 5.0)
    lines = "\n".join(microbatch.advice(config, result, None))
    for cure in ("microbatch_size=4", "remat=block", "dtype=bfloat16", "v5p"):
        assert cure in lines
    # Weights of 2 GiB are not what fills a chip of 16.
    assert "fsdp" not in lines
    assert microbatch.advice(config, made_up(4, 1.0), made_up(4, 1.0)) == []
    better = microbatch.advice(config, made_up(4, 1.0), made_up(8, 1.0))
    assert "--config.train.microbatch_size=32" in better[0] and "10.00 GiB" in better[0]

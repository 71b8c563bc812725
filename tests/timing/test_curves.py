"""The curves of a benchmark: what is varied, and the laws that are fitted, by known ones."""

import pytest

from alignprop_jax.benchmark import edge_of, time_own
from alignprop_jax.timing.curves import (
    QUANTITIES,
    describe_curves,
    fit_line,
    fit_power,
    measure_curves,
)
from alignprop_jax.timing.work import Work

WORK = Work("model", 0, batch_size=4, num_steps=8, guidance_scale=2.0, repeats=1)
EDGE = 16


def seconds_of(work):
    """A law: so much an image, so much more for each of its trained steps, and for its pixels."""
    trained, edge = work.num_steps - work.start, work.edge or EDGE
    return work.batch_size * (0.5 + 0.25 * trained) * (edge / EDGE) ** 1.5


def test_each_quantity_is_varied_alone_and_its_law_found():
    curves = measure_curves(QUANTITIES, WORK, EDGE, seconds_of)
    assert curves["steps"]["values"] == [1, 2, 4, 6, 8]
    assert (curves["steps"]["intercept"], curves["steps"]["slope"]) == pytest.approx((2.0, 1.0))
    assert curves["images"]["values"] == [2, 4, 6, 8]
    assert (curves["images"]["intercept"], curves["images"]["slope"]) == pytest.approx((0, 2.5))
    assert curves["pixels"]["values"] == [8, 16, 24, 32]
    assert curves["pixels"]["exponent"] == pytest.approx(1.5)
    assert curves["rank"]["values"] == [1, 4, 16, 64]
    assert curves["rank"]["slope"] == pytest.approx(0)
    assert all(curve["r2"] == pytest.approx(1) for curve in curves.values())
    table = describe_curves(curves)
    assert "| steps | 1: 3.00, 2: 4.00, 4: 6.00" in table and "2.00 + 1.0000 steps" in table
    assert "proportional to pixels^1.50" in table


def test_what_a_law_does_not_explain():
    assert fit_line([1, 2, 3], [1, 2, 1])["r2"] == pytest.approx(0)
    assert fit_power([1, 2, 4], [1, 2, 1])["r2"] == pytest.approx(0)


def test_size_and_rank_reach_the_run(nano_config):
    model = str(nano_config.parent / "model")
    work = Work(model, 0, 2, num_steps=1, guidance_scale=1.0, repeats=1, edge=16, rank=2)
    assert edge_of(model) == 8
    assert time_own(work) > 0

import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.planning.chips import CHIPS
from alignprop_jax.planning.topology import Topology


@pytest.mark.parametrize(
    "name, topology, chips",
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5litepod-256", "v5e:16x16", 256),
        ("v5e-8", "v5e:2x4", 8),
        ("v4:2x2x1", "v4:2x2x1", 4),
        # The names of these count two cores a chip.
        ("v4-8", "v4:2x2x1", 4),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v6e-4", "v6e:2x2", 4),
    ],
)
def test_slices_have_a_shape_and_the_name_of_an_accelerator_type(name, topology, chips):
    parsed = Topology.parse(name)
    assert (str(parsed), parsed.num_chips) == (topology, chips)


@pytest.mark.parametrize(
    "name, message",
    [
        ("v3-8", "give one of v4, v5e, v5p, v6e with its shape"),
        ("v5e", "is none"),
        ("v5e:2x2x1", "have 2 dimensions, such as v5e:2x4"),
        ("v4-7", "there are v4-8, v4-16,"),
        ("v5litepod-3", "there are v5litepod-1, v5litepod-4, "),
    ],
)
def test_what_is_no_slice_is_named(name, message):
    with pytest.raises(UserError, match=message):
        Topology.parse(name)


def test_clocks_are_those_that_are_known():
    """In GHz, of the data sheets that give them."""
    known = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75}
    assert {name: chip.clock / 1e9 for name, chip in CHIPS.items()} == pytest.approx(
        known, rel=5e-3
    )

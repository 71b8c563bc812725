"""What the TPU's compiler writes, read."""

import pytest

from alignprop_jax.planning.compiler import exhausted_memory


@pytest.mark.parametrize(
    "message, memory",
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            {"all": int(20.5 * 2**30)},
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (20.59G) exceeds available HBM (15.75G).",
            {"temporaries": int(20.59 * 2**30)},
        ),
        ("INTERNAL: Mosaic failed to compile TPU kernel", {}),
    ],
)
def test_what_does_not_fit_is_known_by_its_size(message, memory):
    assert exhausted_memory(message) == memory

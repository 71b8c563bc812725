"""What a config does on a TPU slice: whether it fits, how long a step takes. Asked without a TPU.

    python -m alignprop_jax.plan --config=configs/sd15.py:aesthetic --topology=v5e:4x4

The train step is compiled by the TPU's own compiler (pip install libtpu), which needs no TPU; no
weights are read, and the configs of models in wide use come with the package. Prints a table and,
last, a line of JSON. docs/plan.md tells what the numbers are and how sure they are.
"""

import json
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from alignprop_jax.config import define_config_flag, validate
from alignprop_jax.errors import run_program
from alignprop_jax.planning.chips import GIB
from alignprop_jax.planning.estimate import Estimate, estimate, estimate_memory
from alignprop_jax.planning.microbatch import advice, suggest_microbatch
from alignprop_jax.planning.topology import Topology


def plan(
    config: ConfigDict, topology: str, search: bool = True, timing: bool = True
) -> dict[str, Any]:
    """Compiles the train step of `config` for a slice, prints a table and returns the numbers.

    Args:
        topology: as for `Topology.parse`.
        search: looks for the largest microbatch that fits.
        timing: how long a step takes, too, and how large the program is.

    Raises:
        UserError: the config or the topology cannot be used.
    """
    slice_ = Topology.parse(topology)
    validate(config)
    print(f"compiling {config.model} for {slice_} ({slice_.num_chips} chips) ...", flush=True)
    result = (estimate if timing else estimate_memory)(config, slice_)
    suggested = suggest_microbatch(config, result) if search else None
    print(describe(result))
    numbers = to_dict(result) | {
        "suggested_microbatch": suggested and suggested.images_per_chip * slice_.num_chips
    }
    for line in advice(config, result, suggested):
        print(line)
    return numbers


def to_dict(result: Estimate) -> dict[str, Any]:
    """The numbers of an estimate; those of time are None where they are not known."""
    chip = result.topology.chip
    seconds = result.seconds
    total = sum(seconds.values())
    return {
        "topology": str(result.topology),
        "chips": result.topology.num_chips,
        "hbm_gb": chip.hbm_bytes / GIB,
        "hbm_gb_per_chip": round(sum(result.memory.values()) / GIB, 3),
        "hbm_gb_per_chip_of": {name: round(n / GIB, 4) for name, n in result.memory.items()},
        "fits": result.fits,
        "images_per_chip": result.images_per_chip,
        "images_per_step": result.images_per_step,
        "flops_per_step": result.arithmetic.flops * result.topology.num_chips,
        "collective_bytes_per_chip": result.cost and result.cost.collective_bytes.total(),
        "seconds_per_step": total or None,
        "seconds_per_step_of": seconds or None,
        "images_per_second": result.images_per_step / total if total else None,
        "share_of_peak": result.share_of_peak if total else None,
        "compile_seconds": round(result.compile_seconds, 1),
    }


def describe(result: Estimate) -> str:
    """The table."""
    chip, total = result.topology.chip, sum(result.memory.values())
    rows = [("memory of a chip", f"{total / GIB:.2f} GiB of {chip.hbm_bytes / GIB:g}")]
    rows += [
        (f"  {name.replace('_', ' ')}", f"{size / GIB:.2f} GiB")
        for name, size in result.memory.items()
    ]
    rows += [
        ("fits", "yes" if result.fits else "no"),
        ("images of a chip at a time", f"{result.images_per_chip}"),
        ("images a step", f"{result.images_per_step}"),
        ("operations a step", f"{result.arithmetic.flops * result.topology.num_chips:.3g} FLOP"),
    ]
    if result.cost is not None:
        rows += [("collectives of a chip", f"{result.cost.collective_bytes.total() / 1e6:.3g} MB")]
    if result.seconds:
        seconds = sum(result.seconds.values())
        rows += [("seconds a step", f"{seconds:.3g}")]
        rows += [
            (f"  {name.replace('_', ' ')}", f"{value:.3g}")
            for name, value in result.seconds.items()
        ]
        rows += [
            ("images a second", f"{result.images_per_step / seconds:.3g}"),
            ("share of peak", f"{result.share_of_peak:.1%}"),
        ]
    rows.append(("seconds to compile here", f"{result.compile_seconds:.0f}"))
    return "\n".join(f"{name:28}{value:>24}" for name, value in rows)


if __name__ == "__main__":
    _CONFIG = define_config_flag()
    _TOPOLOGY = flags.DEFINE_string(
        "topology", None, "the slice: v5e:4x4, v4:2x2x1, or v5litepod-16, v4-8", required=True
    )
    _SEARCH = flags.DEFINE_bool("search", True, "look for the largest microbatch that fits")
    _TIMING = flags.DEFINE_bool(
        "timing", True, "how long a step takes, too, for which all of its code has to be written"
    )
    run_program(
        lambda argv: print(
            json.dumps(plan(_CONFIG.value, _TOPOLOGY.value, _SEARCH.value, _TIMING.value))
        )
    )

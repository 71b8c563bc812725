"""How many images a chip has room for, and what to change where they are too many."""

import copy
from collections.abc import Iterator

from ml_collections import ConfigDict

from alignprop_jax.planning.chips import GIB
from alignprop_jax.planning.estimate import Estimate, estimate_memory

# What grows with the number of images.
_OF_IMAGES = "temporaries"
# A search that is further off than so many compilations is ended.
_MOST_COMPILATIONS = 4


def suggest_microbatch(config: ConfigDict, result: Estimate) -> Estimate | None:
    """The largest microbatch that fits; None where not even one image a chip was found.

    Candidates are the divisors of the batch that every chip can have a share of. The first is what
    would fit if all temporaries grew with the images; from there it goes up or down.
    """
    tried = {result.images_per_chip: result}
    candidates = list(images_a_chip(config.train.batch_size // result.topology.num_chips))

    def at(images: int) -> Estimate:
        if images not in tried:
            changed = copy.deepcopy(config)
            changed.train.microbatch_size = images * result.topology.num_chips
            tried[images] = estimate_memory(changed, result.topology)
        return tried[images]

    room = result.topology.chip.hbm_bytes - sum(
        size for name, size in result.memory.items() if name != _OF_IMAGES
    )
    proportional = result.images_per_chip * room / max(result.memory[_OF_IMAGES], 1)
    place = max((i for i, n in enumerate(candidates) if n <= proportional), default=0)
    best = None
    while 0 <= place < len(candidates) and len(tried) <= _MOST_COMPILATIONS:
        found = at(candidates[place])
        if found.fits:
            best = found
            place += 1
            if place < len(candidates) and candidates[place] in tried:
                break
        elif best is not None:
            break
        else:
            place -= 1
    return best


def images_a_chip(batch_size_of_chip: int) -> Iterator[int]:
    """The divisors of a chip's share of the batch, ascending."""
    return (n for n in range(1, batch_size_of_chip + 1) if batch_size_of_chip % n == 0)


def advice(config: ConfigDict, result: Estimate, suggested: Estimate | None) -> list[str]:
    """What to change, a line each; nothing where the config is as good as any that was tried."""
    chips = result.topology.num_chips
    if suggested is not None and suggested.images_per_chip != result.images_per_chip:
        size = suggested.images_per_chip * chips
        memory = sum(suggested.memory.values()) / GIB
        return [
            f"largest that fits: --config.train.microbatch_size={size}, "
            f"{suggested.images_per_chip} images of a chip at a time, {memory:.2f} GiB"
        ]
    if result.fits:
        return []
    lines = [f"does not fit {result.topology.chip.name}; what helps:"]
    if result.images_per_chip > 1:
        lines.append(f"  --config.train.microbatch_size={chips}, one image of a chip at a time")
    if config.remat != "block":
        lines.append("  --config.remat=block, which stores what goes from block to block alone")
    if config.dtype != "bfloat16":
        lines.append("  --config.dtype=bfloat16, which halves weights and activations")
    weights = sum(result.memory[name] for name in ("unet", "vae", "reward"))
    if config.mesh.fsdp == 1 and chips > 1 and weights > result.topology.chip.hbm_bytes / 4:
        lines.append(f"  --config.mesh.fsdp={chips}, which splits the weights over the chips")
    lines.append("  a generation with more memory, such as v5p")
    return lines

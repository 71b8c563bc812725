"""What the chips of Cloud TPUs have.

Memory, bandwidths and bfloat16 peaks are those of cloud.google.com/tpu/docs (a page each: v4, v5e,
v5p, v6e). Clocks follow from the peak and the multipliers of a chip, each of which does one
multiplication and one addition a cycle; of a product of 4096 x 4096 matrices the compiler expects
88 to 97% of that many operations a cycle, on all four.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, whose cores share its memory.

    Attributes:
        name: as in the name of a topology.
        hbm_bytes: memory.
        peak_flops: floating-point operations a second in bfloat16.
        hbm_bandwidth: bytes a second.
        ici_bandwidth: bytes a second to its neighbours.
        matrix_units: how many it has.
        matrix_unit: rows and columns of multipliers of each.
        dimensions: of the torus its slices are cut from.
        cores_in_name: cores that a slice's name counts for a chip: a v4-8 has four chips.
        one_host: the shape of the largest slice of one host.
    """

    name: str
    hbm_bytes: int
    peak_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    matrix_units: int
    matrix_unit: int
    dimensions: int
    cores_in_name: int
    one_host: tuple[int, ...]

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.peak_flops / (2 * self.matrix_units * self.matrix_unit**2)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1.228e12, 0.300e12, 8, 128, 3, 2, (2, 2, 1)),
        Chip("v5e", 16 * GIB, 197e12, 0.819e12, 0.200e12, 4, 128, 2, 1, (2, 4)),
        Chip("v5p", 95 * GIB, 459e12, 2.765e12, 0.600e12, 8, 128, 3, 2, (2, 2, 1)),
        Chip("v6e", 32 * GIB, 918e12, 1.640e12, 0.448e12, 4, 256, 2, 1, (2, 4)),
    )
}

"""Flags of kinds that absl lacks."""

from absl import flags

# A program that defines a flag by this module lists it under --help as its own.
flags.disclaim_key_flags()


class _FiniteParser(flags.FloatParser):
    def is_outside_bounds(self, value: float) -> bool:
        # Not the other way around: NaN is neither below nor above anything.
        return not self.lower_bound <= value <= self.upper_bound


def define_number(
    name: str,
    default: float | None,
    help_text: str,
    least: float,
    most: float,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> flags.FlagHolder[float]:
    """Defines a flag that is a number from `least` to `most`, both included, and never NaN."""
    return flags.DEFINE(_FiniteParser(least, most), name, default, help_text, flag_values)

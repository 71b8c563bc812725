"""Progress bars."""

import sys

from tqdm import tqdm

from alignprop_jax.devices.distributed import is_main


def progress_bar(
    total: int, description: str, unit: str, *, initial: int = 0, leave: bool = True
) -> tqdm:
    """Returns a bar with the time left; `leave` keeps it on the screen when it is full.

    The main process draws it.
    """
    on_screen = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        dynamic_ncols=True,
        # A log file should hold a line now and then, not every redrawing.
        mininterval=0.2 if on_screen else 30,
        leave=leave or not on_screen,
        disable=not is_main(),
    )

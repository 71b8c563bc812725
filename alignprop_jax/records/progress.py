"""Progress bars."""

import sys
import weakref

from tqdm import tqdm

from alignprop_jax.devices.distributed import is_main
from alignprop_jax.process import signals


def progress_bar(
    total: int, description: str, unit: str, *, initial: int = 0, leave: bool = True
) -> tqdm:
    """Returns a bar with the time left; `leave` keeps it on the screen when it is full.

    The main process draws it.
    """
    on_screen = sys.stderr.isatty()
    bar = tqdm(
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
    _bars.add(bar)
    return bar


def _close_bars() -> None:
    for bar in list(_bars):
        bar.close()


# What is said at the end of the program has a line of its own.
_bars: weakref.WeakSet = weakref.WeakSet()
signals.at_end(_close_bars)

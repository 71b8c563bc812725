"""How the seconds of an update grow with the work, one quantity at a time, and by what law."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alignprop_jax.timing.work import Work

QUANTITIES = ("steps", "images", "pixels", "rank")
"""What can be varied: trained steps, images an update, pixels of an edge, rank of the LoRA."""


def works_of(quantity: str, work: Work, edge: int) -> dict[int, Work]:
    """The work at several values of one quantity.

    Args:
        quantity: of `QUANTITIES`.
        work: an update, whose other quantities stay.
        edge: pixels of an edge of the model's own images, which stand for 0 in `work.edge`.
    """
    steps, images = work.num_steps, work.batch_size
    values, change = {
        "steps": (
            sorted({1, *(steps * quarters // 4 for quarters in (1, 2, 3, 4))}),
            lambda trained: {"start": steps - trained},
        ),
        "images": ([images * halves // 2 for halves in (1, 2, 3, 4)], lambda n: {"batch_size": n}),
        "pixels": ([edge * halves // 2 for halves in (1, 2, 3, 4)], lambda n: {"edge": n}),
        "rank": ([1, 4, 16, 64], lambda n: {"rank": n}),
    }[quantity]
    return {n: dataclasses.replace(work, **change(n)) for n in values if n > 0}


def measure_curves(
    quantities: Sequence[str],
    work: Work,
    edge: int,
    seconds_of: Callable[[Work], float],
) -> dict[str, dict[str, Any]]:
    """Times every value of every quantity, and fits a law to each.

    Args:
        seconds_of: times one piece of work.

    Returns:
        By quantity "values", "seconds" and what `fit_line` says, for pixels `fit_power`.
    """
    curves = {}
    for quantity in quantities:
        works = works_of(quantity, work, edge)
        seconds = [seconds_of(each) for each in works.values()]
        fit = fit_power if quantity == "pixels" else fit_line
        values = list(works)
        curves[quantity] = {"values": values, "seconds": seconds, **fit(values, seconds)}
    return curves


def fit_line(values: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Least squares of seconds = "intercept" + "slope" value, and "r2", the variance explained."""
    slope, intercept = np.polyfit(values, seconds, 1)
    explained = _r2(seconds, intercept + slope * np.asarray(values))
    return {"intercept": float(intercept), "slope": float(slope), "r2": explained}


def fit_power(values: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Least squares of log seconds = log "factor" + "exponent" log value, and "r2" of the logs."""
    x, y = np.log(values), np.log(seconds)
    exponent, offset = np.polyfit(x, y, 1)
    explained = _r2(y, offset + exponent * x)
    return {"factor": float(np.exp(offset)), "exponent": float(exponent), "r2": explained}


def _r2(values: Sequence[float], fitted: np.ndarray) -> float:
    values = np.asarray(values)
    spread = np.sum((values - values.mean()) ** 2)
    return float(1 - np.sum((values - fitted) ** 2) / spread) if spread else 1.0


def describe_curves(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """The table, in Markdown."""
    rows = [["varied", "seconds an update", "law", "R²"], ["---"] * 4]
    for quantity, curve in curves.items():
        points = zip(curve["values"], curve["seconds"], strict=True)
        if "exponent" in curve:
            law = f"proportional to {quantity}^{curve['exponent']:.2f}"
        else:
            law = f"{curve['intercept']:.2f} + {curve['slope']:.4f} {quantity}"
        listed = ", ".join(f"{value}: {seconds:.2f}" for value, seconds in points)
        rows.append([quantity, listed, law, f"{curve['r2']:.3f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

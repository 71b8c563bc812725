"""Puts the parts of a sum of rewards on one scale, that of the untrained model's samples."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from alignprop_jax.core.generator import Adapter
from alignprop_jax.devices.distributed import from_main
from alignprop_jax.evaluation.evaluator import Evaluator
from alignprop_jax.inputs.foreign_json import list_of, number
from alignprop_jax.records.metrics import read_json, write_json
from alignprop_jax.records.workdir import Workdir
from alignprop_jax.rewards.weighted_sum import Statistics, measure
from alignprop_jax.runs.experiment import TRAIN, Split

# Samples a mean and a standard deviation are taken of: known to a tenth of the latter.
_NUM_SAMPLES = 64
_SCALE = list_of(number(-1e38, 1e38), 2, 2)


def standardize_parts(
    evaluator: Evaluator,
    workdir: Workdir,
    lora: Adapter | None = None,
    is_known: Callable[[str], bool] = lambda name: True,
    keep: bool = True,
) -> Evaluator:
    """Returns an evaluator whose experiment has the parts of its reward standardised.

    What is measured is kept in the workdir's reward_parts.json, so that a run goes on, and is
    evaluated, by the scale it began with. A reward of one part is left as it is.

    Args:
        lora: an adapter such as will be evaluated, whose program then samples the untrained model,
            too, with zeros in its place; None compiles one without.
        is_known: whether the scale that the workdir has of a part, by its name, is to be used.
        keep: whether the workdir is to have what is measured.
    """
    names = list(evaluator.experiment.reward.parts)
    if not names:
        return evaluator
    found = read_json(workdir.reward_parts) or {}
    known = from_main(
        {n: found[n] for n in names if n in found and _is_scale(found[n]) and is_known(n)}
    )
    if len(known) < len(names):
        known = {**_measure(evaluator, lora), **known}
        if keep:
            write_json(workdir.reward_parts, {**found, **known})
    return evaluator.standardized({name: tuple(known[name]) for name in names})


def _is_scale(value: Any) -> bool:
    """Whether a value is a mean and a standard deviation."""
    try:
        _, std = _SCALE.parse(value)
    except (TypeError, ValueError):
        return False
    return std > 0


def _measure(evaluator: Evaluator, lora: Adapter | None) -> Statistics:
    split: Split = evaluator.experiment.splits[TRAIN]
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), lora)
    scores = evaluator.evaluate(nothing, split, description="scale of rewards", limit=_NUM_SAMPLES)
    return measure(
        {
            name.removeprefix("reward/"): values
            for name, values in scores.scores.items()
            if name.startswith("reward/")
        }
    )

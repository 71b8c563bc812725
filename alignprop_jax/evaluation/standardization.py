"""Puts the parts of a sum of rewards on one scale, that of the untrained model's samples."""

import json

import jax
import numpy as np

from alignprop_jax.core.generator import Adapter
from alignprop_jax.devices.distributed import from_main, is_main
from alignprop_jax.evaluation.evaluator import Evaluator
from alignprop_jax.experiment import TRAIN, Split
from alignprop_jax.records.metrics import write_json
from alignprop_jax.records.workdir import Workdir
from alignprop_jax.rewards.weighted_sum import Statistics, measure

# Samples a mean and a standard deviation are taken of: known to a tenth of the latter.
_NUM_SAMPLES = 64


def standardize_parts(
    evaluator: Evaluator, workdir: Workdir, lora: Adapter | None = None
) -> Evaluator:
    """Returns an evaluator whose experiment has the parts of its reward standardised.

    What is measured is kept in the workdir's reward_parts.json, so that a run goes on, and is
    evaluated, by the scale it began with. A reward of one part is left as it is.

    Args:
        lora: an adapter such as will be evaluated, whose program then samples the untrained model,
            too, with zeros in its place; None compiles one without.
    """
    names = list(evaluator.experiment.reward.parts)
    if not names:
        return evaluator
    path = workdir.reward_parts
    written = is_main() and path.exists()
    known = from_main(json.loads(path.read_text("utf-8")) if written else {})
    if set(names) - known.keys():
        known = {**_measure(evaluator, lora), **known}
        write_json(path, {name: known[name] for name in names})
    return evaluator.standardized({name: tuple(known[name]) for name in names})


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
